"""Texts > unit vectors: any callable with a name, by default a sentence-transformers model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from gist_rag.errors import MissingExtra, ModelNotFound

Vectors: TypeAlias = npt.NDArray[np.float32]


class Embedder(Protocol):
    """Turns texts into vectors whose inner product is their likeness."""

    @property
    def name(self) -> str:
        """Kept beside an index, so that a question is never embedded by another model."""
        ...

    def __call__(self, texts: Sequence[str]) -> Vectors:
        """``(n, d)`` float32 rows of length 1."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model, loaded when the first text comes.

    Args:
        source: local folder or Hugging Face id.
        name: what an index remembers it by; default ``source``. Give one where ``source`` is a
            folder that differs between machines.

    Raises:
        MissingExtra: sentence-transformers is not installed.
    """

    def __init__(self, source: str, name: str = "") -> None:
        if find_spec("sentence_transformers") is None:
            raise MissingExtra("sentence-transformers", "faiss")
        self.source = source
        self.name = name or source
        self._model: Any = None
        self._lock = threading.Lock()  # of loading, and of its tokenizer

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.load()
        with self._lock:
            vectors = self._model.encode(
                list(texts),
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        return np.asarray(vectors, dtype=np.float32)

    def load(self) -> None:
        """Load the model, unless it is there.

        Raises:
            ModelNotFound: there is none.
        """
        from sentence_transformers import SentenceTransformer

        try:
            with self._lock:
                if self._model is None:
                    self._model = SentenceTransformer(self.source)
        except (OSError, ValueError) as error:
            raise ModelNotFound(
                f"{self.source!r} is neither a local folder nor a reachable sentence-transformers "
                f"model: {error}"
            ) from error
