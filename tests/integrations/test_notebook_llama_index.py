"""The LlamaIndex notebook, cell by cell, over a tiny random model."""

from __future__ import annotations

import ast
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings

pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[2] / "examples/llama_index.ipynb"


@pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning")
async def test_notebook_runs_from_top_to_bottom(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIST_RAG_MODEL", str(tiny_model_folder))
    monkeypatch.setattr(Settings, "_embed_model", None)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf8"))["cells"]
    space: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            code = compile(source, f"cell {number}", "exec", flags=flags)
            ended = eval(code, space)
            if isinstance(ended, Awaitable):
                await ended
