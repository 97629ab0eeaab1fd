"""The floors of the house: who may import whom. A new arrow is a one-line change here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE_ROOTS = (
    ROOT,
    ROOT / "kernels",
    ROOT / "integrations/langchain",
    ROOT / "integrations/llama_index",
)

ROOMS: dict[str, tuple[int, frozenset[str]]] = {
    # room: (floor, rooms of ours that it may import)
    "gist_rag_kernels": (1, frozenset()),
    "gist_rag.errors": (1, frozenset()),
    "gist_rag.losses": (1, frozenset()),
    "gist_rag.types": (2, frozenset({"gist_rag.errors", "gist_rag_kernels"})),
    "gist_rag.aio": (3, frozenset({"gist_rag.errors"})),
    "gist_rag.batching": (1, frozenset()),
    "gist_rag.constrain": (2, frozenset({"gist_rag.errors"})),
    "gist_rag.detokenize": (3, frozenset()),
    "gist_rag.jsonl": (2, frozenset({"gist_rag.errors"})),
    "gist_rag.layout": (3, frozenset({"gist_rag.types", "gist_rag.errors", "gist_rag_kernels"})),
    "gist_rag.matching": (
        5,
        frozenset({"gist_rag.errors", "gist_rag.types", "gist_rag.windows"}),
    ),
    "gist_rag.modes": (1, frozenset()),
    "gist_rag.models": (3, frozenset({"gist_rag.errors"})),
    "gist_rag.priming": (
        3,
        frozenset({"gist_rag.types", "gist_rag.errors", "gist_rag.modes"}),
    ),
    "gist_rag.prompt": (3, frozenset({"gist_rag.types", "gist_rag.errors"})),
    "gist_rag.retrieval": (
        3,
        frozenset({"gist_rag.types", "gist_rag.errors", "gist_rag.jsonl"}),
    ),
    "gist_rag.sampling": (3, frozenset({"gist_rag.constrain", "gist_rag.types"})),
    "gist_rag.store": (
        5,
        frozenset({"gist_rag.errors", "gist_rag.types", "gist_rag.windows", "gist_rag_kernels"}),
    ),
    "gist_rag.windows": (3, frozenset({"gist_rag.types"})),
    "gist_rag.tools": (
        3,
        frozenset({"gist_rag.constrain", "gist_rag.errors", "gist_rag.types"}),
    ),
    "gist_rag.questions": (3, frozenset({"gist_rag.errors", "gist_rag.jsonl"})),
    "gist_rag.sample": (
        5,
        frozenset({"gist_rag.questions", "gist_rag.retrieval", "gist_rag.types"}),
    ),
    "gist_rag.attention": (4, frozenset({"gist_rag.layout", "gist_rag_kernels"})),
    "gist_rag.backbone": (
        5,
        frozenset(
            {
                "gist_rag.attention",
                "gist_rag.constrain",
                "gist_rag.errors",
                "gist_rag.layout",
                "gist_rag.mixture",
                "gist_rag.sampling",
                "gist_rag.types",
                "gist_rag_kernels",
            }
        ),
    ),
    "gist_rag.compose": (
        6,
        frozenset(
            {
                "gist_rag.backbone",
                "gist_rag.layout",
                "gist_rag.types",
                "gist_rag.errors",
                "gist_rag_kernels",
            }
        ),
    ),
    "gist_rag.budget": (4, frozenset({"gist_rag.errors", "gist_rag.types"})),
    "gist_rag.mixture": (4, frozenset()),
    "gist_rag.focus": (7, frozenset({"gist_rag.backbone", "gist_rag.compose", "gist_rag.errors"})),
    "gist_rag.likeness": (
        6,
        frozenset(
            {
                "gist_rag.errors",
                "gist_rag.models",
                "gist_rag.prompt",
                "gist_rag.retrieval",
                "gist_rag.store",
                "gist_rag.types",
            }
        ),
    ),
    "gist_rag.lora": (6, frozenset({"gist_rag.backbone", "gist_rag.errors"})),
    "gist_rag.reader": (
        7,
        frozenset({"gist_rag.backbone", "gist_rag.errors", "gist_rag.lora", "gist_rag.models"}),
    ),
    "gist_rag.compressors": (
        7,
        frozenset(
            {
                "gist_rag.backbone",
                "gist_rag.compose",
                "gist_rag.errors",
                "gist_rag.layout",
                "gist_rag.lora",
                "gist_rag.losses",
                "gist_rag.prompt",
                "gist_rag.types",
                "gist_rag_kernels",
            }
        ),
    ),
    "gist_rag.train": (
        8,
        frozenset(
            {
                "gist_rag.backbone",
                "gist_rag.compose",
                "gist_rag.compressors",
                "gist_rag.errors",
                "gist_rag.jsonl",
                "gist_rag.lora",
                "gist_rag.losses",
                "gist_rag.models",
                "gist_rag.reader",
                "gist_rag.prompt",
                "gist_rag.questions",
                "gist_rag.retrieval",
                "gist_rag.types",
            }
        ),
    ),
    "gist_rag.opening": (
        8,
        frozenset(
            {
                "gist_rag.backbone",
                "gist_rag.budget",
                "gist_rag.compose",
                "gist_rag.errors",
                "gist_rag.focus",
                "gist_rag.layout",
                "gist_rag.mixture",
                "gist_rag.prompt",
                "gist_rag.reader",
                "gist_rag.types",
            }
        ),
    ),
    "gist_rag.engine": (
        9,
        frozenset(
            {
                "gist_rag.backbone",
                "gist_rag.batching",
                "gist_rag.budget",
                "gist_rag.compose",
                "gist_rag.compressors",
                "gist_rag.detokenize",
                "gist_rag.errors",
                "gist_rag.focus",
                "gist_rag.likeness",
                "gist_rag.matching",
                "gist_rag.models",
                "gist_rag.modes",
                "gist_rag.opening",
                "gist_rag.reader",
                "gist_rag.priming",
                "gist_rag.prompt",
                "gist_rag.store",
                "gist_rag.tools",
                "gist_rag.types",
            }
        ),
    ),
    "gist_rag.rag": (
        10,
        frozenset(
            {
                "gist_rag.engine",
                "gist_rag.errors",
                "gist_rag.likeness",
                "gist_rag.models",
                "gist_rag.prompt",
                "gist_rag.retrieval",
                "gist_rag.store",
                "gist_rag.types",
            }
        ),
    ),
    "gist_rag.evaluate": (
        10,
        frozenset(
            {
                "gist_rag.backbone",
                "gist_rag.budget",
                "gist_rag.compose",
                "gist_rag.compressors",
                "gist_rag.engine",
                "gist_rag.errors",
                "gist_rag.focus",
                "gist_rag.jsonl",
                "gist_rag.likeness",
                "gist_rag.matching",
                "gist_rag.mixture",
                "gist_rag.models",
                "gist_rag.reader",
                "gist_rag.prompt",
                "gist_rag.questions",
                "gist_rag.sample",
                "gist_rag.store",
                "gist_rag.types",
                "gist_rag.windows",
            }
        ),
    ),
    "gist_rag": (11, frozenset()),
    "langchain_gist_rag": (12, frozenset({"gist_rag", "gist_rag.PUBLIC"})),
    "llama_index.llms.gist_rag": (12, frozenset({"gist_rag", "gist_rag.PUBLIC"})),
    "gist_rag.demo": (13, frozenset({"*"})),
    "gist_rag.cli": (14, frozenset({"*"})),
}
PUBLIC = {
    "gist_rag.aio",
    "gist_rag.constrain",
    "gist_rag.engine",
    "gist_rag.errors",
    "gist_rag.models",
    "gist_rag.modes",
    "gist_rag.tools",
    "gist_rag.types",
}
"""Modules whose names users and adapters may import directly."""


def room_of(module: str) -> str | None:
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        if (name := ".".join(parts[:size])) in ROOMS:
            return name
    return None


def sources() -> list[tuple[str, Path]]:
    found = []
    for root in PACKAGE_ROOTS:
        for package in ("gist_rag", "gist_rag_kernels", "langchain_gist_rag", "llama_index"):
            for path in sorted((root / package).rglob("*.py")):
                module = ".".join(path.relative_to(root).with_suffix("").parts)
                found.append((module.removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    """Modules that a file imports at run time, wherever in the file."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {w if room_of(w) != room_of(node.module) else node.module for w in whole}
    return names


def arrows() -> list[tuple[str, str, str]]:
    out = []
    for module, path in sources():
        home = room_of(module)
        for name in imports(path):
            room = room_of(name)
            if room and room != home:
                out.append((module, str(home), room))
    return out


def test_every_file_has_a_room() -> None:
    assert [m for m, _ in sources() if room_of(m) is None] == []


def test_no_file_imports_a_room_it_may_not() -> None:
    wrong = []
    for module, home, room in arrows():
        allowed = ROOMS[home][1]
        public = "gist_rag.PUBLIC" in allowed and room in PUBLIC
        if not (room in allowed or "*" in allowed or public):
            wrong.append(f"{module} imports {room}")
    assert wrong == []


def test_no_arrow_points_up() -> None:
    assert [a for a in arrows() if ROOMS[a[1]][0] <= ROOMS[a[2]][0]] == []


@pytest.mark.parametrize("folder", ["kernels", "integrations", "tests", "examples"])
def test_container_folders_are_no_packages(folder: str) -> None:
    """A top-level ``kernels/__init__.py`` would shadow Hugging Face's ``kernels``."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_a_method_imports_no_other_method() -> None:
    methods = {p.stem for p in (ROOT / "gist_rag/compressors").glob("*.py")} - {
        "__init__",
        "base",
        "registry",
        "repeat",
    }
    wrong = []
    for method in methods:
        path = ROOT / "gist_rag/compressors" / f"{method}.py"
        for name in imports(path):
            other = name.removeprefix("gist_rag.compressors.").partition(".")[0]
            if name.startswith("gist_rag.compressors.") and other in methods - {method}:
                wrong.append(f"{method} imports {other}")
    assert wrong == []
