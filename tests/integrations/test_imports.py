"""Importing the integrations: cheap, and clear about what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "from langchain_gist_rag import ChatGist, GistLLM; ChatGist(), GistLLM()",
        "from llama_index.llms.gist_rag import GistLLM; GistLLM().to_dict()",
    ],
    ids=["langchain", "llama_index"],
)
def test_import_does_not_load_torch(statement: str) -> None:
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "statement"),
    [
        ("langchain_core", "from langchain_gist_rag import ChatGist"),
        ("langchain", "from langchain_gist_rag import GistMiddleware"),
        ("llama_index.core", "from llama_index.llms.gist_rag import GistLLM"),
    ],
)
def test_missing_framework_is_named(hidden: str, statement: str) -> None:
    code = f"import sys; sys.modules[{hidden!r}] = None; {statement}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtra: " in ended.stderr
    assert "pip install 'gist-rag[" in ended.stderr
