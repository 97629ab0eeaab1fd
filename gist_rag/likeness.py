"""How like a question passages are: an embedder judges which of them a prompt is about.

That is what retrieval has asked already, but a prompt does not say what it found. Vectors of
passages are kept in the store, so that a prompt costs one vector, of its question.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gist_rag.models import embedder_folder
from gist_rag.prompt import Known
from gist_rag.retrieval import Embedder, SentenceEmbedder, Vectors
from gist_rag.store import GistStore
from gist_rag.types import Passage

LIKELIHOOD: Literal["likelihood"] = "likelihood"
"""The judge that needs no embedder: the model itself (``focus``)."""
Judge: TypeAlias = Embedder | Literal["likelihood"]
"""Who says which passages a prompt is about."""
SHARPNESS = 60.0
"""Nats per unit of cosine, for an embedder whose likenesses spread as those of MiniLM do."""
REMEMBERED = 4096
"""Vectors of passages that came without one, and are kept in memory."""


class Likeness:
    """Judges passages by the likeness of their vectors to that of the question.

    Args:
        embedder: whose vectors.
        store: keeps those of passages; without one they are kept in memory only.
        sharpness: how many nats one unit of cosine is worth.
    """

    def __init__(
        self, embedder: Embedder, store: GistStore | None = None, sharpness: float = SHARPNESS
    ) -> None:
        self.embedder = embedder
        self.sharpness = sharpness
        self._store = store
        self._seen: OrderedDict[str, Vectors] = OrderedDict()
        self._lock = threading.Lock()  # tokenizers are not safe to share

    def learn(self, passages: Sequence[Passage]) -> dict[str, Vectors]:
        """Vectors ``(d,)`` of stored passages by content; those that had none get one.

        Raises:
            StoreLocked, StoreWriteError: see ``GistStore.put_many``.
        """
        assert self._store is not None
        contents = [p.content for p in passages]
        known = self._store.vectors(self.embedder.name, contents)
        new = {p.content: p.text for p in passages if p.content not in known}
        if new:
            fresh = dict(zip(new, self._embed([*new.values()]), strict=True))
            self._store.put_vectors(self.embedder.name, fresh)
            known |= fresh
        return {content: known[content] for content in contents}

    def __call__(self, question: str, passages: Sequence[Known]) -> Tensor:
        """Likenesses of passages to a question, ``(P,)`` in nats."""
        contents = [passage.content for passage in passages]
        known = {} if self._store is None else self._store.vectors(self.embedder.name, contents)
        with self._lock:
            known |= {c: self._seen[c] for c in contents if c in self._seen and c not in known}
        new = {p.content: p.text for p in passages if p.content not in known}
        asked, *embedded = self._embed([question, *new.values()])
        known |= (fresh := dict(zip(new, embedded, strict=True)))
        with self._lock:
            self._seen |= fresh
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        cosines = np.stack([known[content] for content in contents]) @ asked
        return self.sharpness * torch.from_numpy(cosines)

    def _embed(self, texts: Sequence[str]) -> Vectors:
        with self._lock:
            return self.embedder(texts)


def named_embedder(name: str) -> SentenceEmbedder:
    """The embedder that an index, or a user, calls by this name."""
    return SentenceEmbedder(embedder_folder(name), name)


def named_judge(judge: Judge | str | None) -> Judge | None:
    """A judge by name: ``"likelihood"``, or an embedder's."""
    if judge == LIKELIHOOD:
        return LIKELIHOOD
    return named_embedder(judge) if isinstance(judge, str) else judge
