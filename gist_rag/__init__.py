"""Compress RAG passages once into small KV states and answer from those instead of the text.

    >>> from gist_rag import GistEngine, Passage
    >>> engine = GistEngine.from_pretrained(store="./gists")
    >>> engine.precompute([Passage("SQLite is a C library ...")])
    >>> engine.generate([{"role": "user", "content": "SQLite is a C library ... What is SQLite?"}])

Names are imported on first use, so that ``import gist_rag`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gist_rag.backbone import Backbone
    from gist_rag.compressors import COMPRESSORS, Compressor
    from gist_rag.engine import GistEngine
    from gist_rag.errors import GistRagError
    from gist_rag.rag import GistRAG
    from gist_rag.retrieval import VectorIndex
    from gist_rag.store import GistStore
    from gist_rag.types import Answer, GistKey, GistState, Passage, Sampling

__version__ = "0.1.0"

_HOMES = {
    "COMPRESSORS": "compressors",
    "Answer": "types",
    "Backbone": "backbone",
    "Compressor": "compressors",
    "GistEngine": "engine",
    "GistKey": "types",
    "GistRAG": "rag",
    "GistRagError": "errors",
    "GistState": "types",
    "GistStore": "store",
    "Passage": "types",
    "Sampling": "types",
    "VectorIndex": "retrieval",
}

__all__ = [
    "COMPRESSORS",
    "Answer",
    "Backbone",
    "Compressor",
    "GistEngine",
    "GistKey",
    "GistRAG",
    "GistRagError",
    "GistState",
    "GistStore",
    "Passage",
    "Sampling",
    "VectorIndex",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gist_rag' has no attribute {name!r}")
    return getattr(import_module(f"gist_rag.{_HOMES[name]}"), name)
