"""``GistRAG``: a question in, an answer out. FAISS finds passages, the engine reads their gists.

question > embed > FAISS row > content key > passage > prompt > engine
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from gist_rag.engine import Chunk, GistEngine, Precomputed
from gist_rag.errors import BadInput, CorruptEntry, IndexMismatch, SpaceMismatch
from gist_rag.likeness import LIKELIHOOD, Judge, Likeness, named_embedder
from gist_rag.models import DEFAULT_EMBEDDER
from gist_rag.prompt import rag_messages, rag_segments
from gist_rag.retrieval import Embedder, VectorIndex
from gist_rag.store import GistStore
from gist_rag.types import Answer, Passage, Sampling

INDEX = "index"
"""The judge that is the embedder of the index."""
EMBED_BATCH = 256
"""Passages that are embedded at a time."""


@dataclass(frozen=True)
class Found:
    """A retrieved passage and its likeness to the question."""

    passage: Passage
    score: float


class GistRAG:
    """Retrieval, gists and a model as one thing. Make it with ``open``, or fill it with ``build``.

    The index lies in the store's folder. ``build`` makes both hold the same passages, ``open``
    refuses a pair that does not.

    Args:
        engine: compresses passages and answers.
        index: rows of the engine's passages; default the one beside its gists, or an empty one.
        embedder: default the one that the index was made with, else the engine's judge where
            that is one, else the packaged MiniLM.
    """

    def __init__(
        self,
        engine: GistEngine,
        index: VectorIndex | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        self.engine = engine
        saved = _saved_index(index_folder(engine.store, engine.space)) if index is None else index
        self.embedder: Embedder = embedder or _own_embedder(engine, saved)
        if index is None and (saved is None or saved.embedder != self.embedder.name):
            saved = VectorIndex(self.embedder.name)
        assert saved is not None
        self.index = saved
        if self.index.embedder != self.embedder.name:
            raise _embedder_mismatch(self.index, self.embedder)

    @classmethod
    def open(
        cls,
        store: Path | str,
        *,
        namespace: str | None = None,
        model: str | None = None,
        compressor: str | Path | None = None,
        embedder: Embedder | None = None,
        reader: str | Path | None = None,
        judge: Judge | str | None = "auto",
        focus: int | None = None,
        apart: int | None = None,
        expand: float | None = None,
        budget: str | float | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> Self:
        """Reopen what ``build`` left in a store's folder, with the settings it was made with.

        Args:
            namespace: whose gists; needed only where a store holds several namespaces. Where one
                namespace has several spaces (another ratio, say), the newest is taken.
            model: where the model is to be found now, if not under its old name.
            compressor: where the folder of a trained compressor is to be found now.
            embedder: default the one the index was made with.
            judge: see ``GistEngine``; ``"index"`` is the embedder of the index, which weighs
                passages for next to nothing. Default: that one, unless ``focus`` or ``apart`` is
                given.
            reader, focus, apart, expand, budget: see ``GistEngine.from_pretrained``.
            dtype, device: see ``models.load_model``.

        Raises:
            BadInput: no store, no gists in it, or several namespaces to choose from.
            SpaceMismatch: the model or compressor is not the one that made the gists.
            IndexMismatch: no index, or one that does not hold the passages of the store.
        """
        read_only = not os.access(store, os.W_OK)
        opened = GistStore.open(store, create=False, read_only=read_only)
        try:
            space, description = _choose_space(opened, namespace)
            index = VectorIndex.load(index_folder(opened, space))
            embedder = embedder or named_embedder(index.embedder)
            check_index(index, opened, space)
            if judge == "auto":
                judge = INDEX if focus is None and apart is None else None
            options = {
                "reader": reader,
                "judge": embedder if judge == INDEX else judge,
                "focus": focus,
                "apart": apart,
                "expand": expand,
                "budget": budget,
                "dtype": dtype,
                "device": device,
            }
            engine = _reopen(opened, description, model, compressor, **options)
            if engine.space != space:
                raise SpaceMismatch(
                    f"the gists in {opened.path} were made by {description['model']} with "
                    f"{description['compressor']}; what these names stand for now is not the same. "
                    "Give the model and compressor they were made by, or precompute again"
                )
            return cls(engine, index, embedder)
        except BaseException:
            opened.close()
            raise

    def build(
        self,
        passages: Sequence[Passage],
        *,
        progress: Callable[[int, int, int], None] | None = None,
    ) -> Precomputed:
        """Compress and index passages that are not there yet, and save the index.

        Also repairs: gists without a row get one, rows without a gist go.

        Args:
            progress: see ``GistEngine.precompute``.
        """
        done = self.engine.precompute(passages, progress=progress)
        store, space = self.engine.store, self.engine.space
        self.index.remove(set(self.index.contents).difference(store.contents(space)))
        stored, likeness = store.passages(space), Likeness(self.embedder, store)
        with store.released():
            while batch := [*itertools.islice(stored, EMBED_BATCH)]:
                vectors = likeness.learn(batch)
                self.index.add([*vectors], np.stack([*vectors.values()]))
        self._save()
        check_index(self.index, store, space)
        return done

    def search(self, question: str, k: int = 5) -> list[Found]:
        """The ``k`` passages nearest to a question, best first.

        Raises:
            BadInput: an empty question, or ``k`` below 1.
            IndexMismatch: a passage was deleted by somebody else, or ``build`` was never called.
        """
        if not question.strip():
            raise BadInput("the question is empty")
        store = self.engine.store
        if not len(self.index):
            check_index(self.index, store, self.engine.space)
        [hits] = self.index.search(self.embedder([question]), k)
        found = []
        for hit in hits:
            passage = store.passage(hit.content)
            if passage is None:
                raise IndexMismatch(
                    f"passage {hit.content} was deleted from {store.path} since its index was "
                    "opened; open it again"
                )
            found.append(Found(passage, hit.score))
        return found

    def retrieve(self, question: str, k: int = 5) -> list[Passage]:
        """``search`` without scores."""
        return [found.passage for found in self.search(question, k)]

    def ask(
        self,
        question: str,
        k: int = 5,
        sampling: Sampling | None = None,
        *,
        full_text: bool = False,
        passages: Sequence[Passage] | None = None,
    ) -> Answer:
        """Answer a question from its passages.

        Args:
            k: how many to retrieve.
            full_text: read them as text, for comparison.
            passages: read these instead of retrieving any.
        """
        *_, last = self.stream(question, k, sampling, full_text=full_text, passages=passages)
        assert last.answer is not None
        return last.answer

    def stream(
        self,
        question: str,
        k: int = 5,
        sampling: Sampling | None = None,
        *,
        full_text: bool = False,
        passages: Sequence[Passage] | None = None,
    ) -> Iterator[Chunk]:
        """``ask`` piece by piece; the last piece carries the whole answer."""
        chosen = self.retrieve(question, k) if passages is None else passages
        if full_text:
            messages = rag_messages(question, [passage.text for passage in chosen])
            return self.engine.stream(messages, sampling, gist_mode="off")
        # Nobody needs to look for passages that we put there; the shortest would not be found.
        segments = rag_segments(question, chosen, self.engine.backbone.render)
        return self.engine.stream(segments, sampling)

    def delete(self, content: str) -> bool:
        """Forget a passage, gist and row; whether there was one."""
        with self.engine.store.released():
            deleted = self.engine.store.delete(content, self.engine.space)
        removed = self.index.remove([content])
        if removed:
            self._save()
        return bool(deleted or removed)

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save(self) -> None:
        self.index.save(index_folder(self.engine.store, self.engine.space))


def index_folder(store: GistStore, space: str) -> Path:
    """Where the index of a space lies. A space says its namespace, so no two tenants share one."""
    return store.path / "index" / space[:16]


def check_index(index: VectorIndex, store: GistStore, space: str) -> None:
    """Whether index and store hold the same passages.

    Raises:
        IndexMismatch: says how many are on one side only.
    """
    rows, gists = set(index.contents), set(store.contents(space))
    if rows != gists:
        raise IndexMismatch(
            f"{len(rows - gists)} of {len(rows)} index rows have no gist and {len(gists - rows)} "
            f"of {len(gists)} gists have no index row in {store.path}; run gist-rag precompute "
            "again, or wait if it is running now"
        )


def _saved_index(folder: Path) -> VectorIndex | None:
    """The index in a folder, if there is one that can be read."""
    try:
        return VectorIndex.load(folder)
    except (IndexMismatch, CorruptEntry):
        return None


def _own_embedder(engine: GistEngine, index: VectorIndex | None) -> Embedder:
    """The embedder of an index, or of one that is to be made, where nobody says which."""
    judge = None if engine.judge == LIKELIHOOD else engine.judge
    if index is None:
        return judge or named_embedder(DEFAULT_EMBEDDER)
    return judge if judge and judge.name == index.embedder else named_embedder(index.embedder)


def _embedder_mismatch(index: VectorIndex, embedder: Embedder) -> IndexMismatch:
    return IndexMismatch(
        f"the index was made with embedder {index.embedder!r}, not {embedder.name!r}; give that "
        "one, or build the index anew"
    )


def _choose_space(store: GistStore, namespace: str | None) -> tuple[str, Mapping[str, Any]]:
    """The newest space of a namespace; of the only one, where none is named."""
    spaces = store.spaces()
    namespaces = sorted({str(d.get("namespace", "")) for d in spaces.values()})
    if namespace is None and len(namespaces) == 1:
        namespace = namespaces[0]
    if namespace is None and namespaces:
        raise BadInput(
            f"{store.path} holds several namespaces ({', '.join(map(repr, namespaces))}); say which"
        )
    chosen = [
        (space, description)
        for space, description in spaces.items()
        if description.get("namespace", "") == namespace and store.contents(space)
    ]
    if not chosen:
        raise BadInput(
            f"no gists of namespace {namespace or ''!r} in {store.path}; run gist-rag precompute"
        )
    return chosen[-1]


def _reopen(
    store: GistStore,
    description: Mapping[str, Any],
    model: str | None,
    compressor: str | Path | None,
    **options: Any,
) -> GistEngine:
    """An engine as ``GistEngine.describe`` described it."""
    folder, settings = compressor or description.get("folder"), description["settings"]
    if folder:  # the rest lies there
        settings = {name: settings[name] for name in ("ratio", "coarser") if name in settings}
    return GistEngine.from_pretrained(
        model or description["model"],
        store,
        compressor=folder or description["compressor"],
        settings=settings,
        codec=description["codec"],
        namespace=description["namespace"],
        **options,
    )
