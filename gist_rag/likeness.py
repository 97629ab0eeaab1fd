"""How like a question passages are: an embedder judges which of them a prompt is about.

That is what retrieval has asked already, but a prompt does not say what it found. Vectors of
passages are kept in the store, so that a prompt costs one vector, of its question.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gist_rag.errors import BadInput, ModelNotFound, StoreLocked, StoreWriteError
from gist_rag.models import embedder_folder
from gist_rag.prompt import Known
from gist_rag.retrieval import Embedder, SentenceEmbedder, Vectors
from gist_rag.store import GistStore
from gist_rag.types import Passage

logger = logging.getLogger(__name__)

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
        self._lock = threading.Lock()
        self._complained = False

    @classmethod
    def of(cls, judge: Judge | None, store: GistStore | None = None) -> Self | None:
        """For a judge that is an embedder; ``None`` where there is none."""
        return None if judge is None or judge == LIKELIHOOD else cls(judge, store)

    def learn(self, passages: Sequence[Passage]) -> dict[str, Vectors]:
        """Vectors ``(d,)`` of stored passages by content; those that had none get one, in the
        store if it can be written.

        Raises:
            BadInput: the embedder gives no vectors.
        """
        texts = {p.content: p.text for p in passages}
        stored, seen = self._known(texts)
        new = {c: text for c, text in texts.items() if c not in stored and c not in seen}
        made = dict(zip(new, self._embed([*new.values()]), strict=True)) if new else {}
        if unstored := {c: v for c, v in (seen | made).items() if c not in stored}:
            self._keep(unstored)
        known = seen | made | stored
        return {content: known[content] for content in texts}

    def __call__(self, question: str, passages: Sequence[Known]) -> Tensor:
        """Likenesses of passages to a question, ``(P,)`` in nats.

        Raises:
            BadInput: the embedder gives no vectors.
        """
        texts = {passage.content: passage.text for passage in passages}
        stored, seen = self._known(texts)
        known = seen | stored
        new = {content: self._text(content, texts[content]) for content in texts.keys() - known}
        asked, *embedded = self._embed([question, *new.values()])
        known |= (fresh := dict(zip(new, embedded, strict=True)))
        self._remember(fresh)
        if other := {len(vector) for vector in known.values()} - {len(asked)}:
            raise BadInput(
                f"embedder {self.embedder.name!r} gives vectors of {len(asked)} numbers, but those "
                f"that are stored under its name have {other.pop()}; give it another name"
            )
        cosines = np.stack([known[passage.content] for passage in passages]) @ asked
        return self.sharpness * torch.from_numpy(cosines)

    def _known(self, contents: Iterable[str]) -> tuple[dict[str, Vectors], dict[str, Vectors]]:
        """Vectors that need not be made: those in the store, and those in memory."""
        stored = {} if self._store is None else self._store.vectors(self.embedder.name, contents)
        with self._lock:
            return stored, {c: self._seen[c] for c in contents if c in self._seen}

    def _text(self, content: str, shown: str) -> str:
        """A passage as it was stored; prompts may spell it in JSON."""
        stored = None if self._store is None else self._store.passage(content)
        return shown if stored is None else stored.text

    def _embed(self, texts: Sequence[str]) -> Vectors:
        """``(n, d)`` float32 rows of length 1."""
        vectors = np.asarray(self.embedder(texts), dtype=np.float32)
        lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not (lengths > 0).all():
            raise BadInput(
                f"embedder {self.embedder.name!r} gave an array of shape {vectors.shape} for "
                f"{len(texts)} texts, or rows without a length; it must give a vector for each"
            )
        if not np.isfinite(lengths).all():
            raise BadInput(f"embedder {self.embedder.name!r} gave vectors that are not finite")
        unit: Vectors = vectors / lengths
        return unit

    def _keep(self, vectors: Mapping[str, Vectors]) -> None:
        """A vector is made in no time: one that cannot be stored now may be stored later."""
        if self._store is not None:
            try:
                return self._store.put_vectors(self.embedder.name, vectors)
            except (StoreLocked, StoreWriteError) as error:
                if not self._complained:
                    logger.warning("vectors of passages stay in memory for now: %s", error)
                self._complained = True
        self._remember(vectors)

    def _remember(self, vectors: Mapping[str, Vectors]) -> None:
        with self._lock:
            self._seen |= vectors
            while len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)


def named_embedder(name: str) -> SentenceEmbedder:
    """The embedder that an index, or a user, calls by this name."""
    return SentenceEmbedder(embedder_folder(name), name)


def named_judge(judge: Judge | Path | str | None) -> Judge | None:
    """A judge by name: ``"likelihood"``, or an embedder's, which is loaded.

    Raises:
        BadInput: there is no embedder of that name.
        MissingExtra: what loads it is not installed.
    """
    if judge == LIKELIHOOD:
        return LIKELIHOOD
    if not isinstance(judge, str | Path):
        return judge
    embedder = named_embedder(str(judge))
    try:
        embedder.load()
    except ModelNotFound as error:
        raise BadInput(
            f"judge is {str(judge)!r}: neither {LIKELIHOOD!r} nor an embedder. {error}"
        ) from error
    return embedder
