"""The LangChain notebook, cell by cell, over a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/langchain.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning")
def test_notebook_runs(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIST_RAG_MODEL", str(tiny_model_folder))
    notebook = json.loads(NOTEBOOK.read_text())
    names = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            source = compile("".join(cell["source"]), NOTEBOOK, "exec", dont_inherit=True)
            exec(source, names)
