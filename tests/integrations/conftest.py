"""An engine whose prompts can be looked at, over a store that all integration tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.models import embedder_folder
from gist_rag.prompt import Known
from gist_rag.types import Passage


class SeenPrompts:
    """How an engine split the prompts it was given: passage ids and remaining text of each."""

    def __init__(self, passages: list[Passage]) -> None:
        self._ids = {p.content: p.id for p in passages}
        self._texts = [p.text for p in passages]
        self.gists: list[list[str]] = []
        self.texts: list[str] = []
        self.read: list[list[Any]] = []

    def add(self, segments: list[Any]) -> None:
        self.read.append(segments)
        known = [s for s in segments if isinstance(s, Known)]
        self.gists.append([self._ids.get(s.content, s.content) for s in known])
        self.texts.append("".join(s.text for s in segments if s not in known))

    def no_passage_as_text(self) -> bool:
        return not any(passage in text for text in self.texts for passage in self._texts)


@pytest.fixture(scope="session")
def known(passages: list[Passage]) -> list[Passage]:
    """The passages that the shared store has gists of."""
    return passages[:8]


@pytest.fixture(scope="session")
def gists(
    backbone: Backbone, known: list[Passage], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A store with gists of the known passages, only to be read from."""
    folder = tmp_path_factory.mktemp("gists")
    with GistEngine(backbone, _compressor(backbone), folder) as engine:
        engine.precompute(known)
    return folder


@pytest.fixture(scope="session")
def vectors(known: list[Passage]) -> Any:
    """FAISS with MiniLM over the known passages, as LangChain has it."""
    from langchain_community.vectorstores import FAISS
    from langchain_core.documents import Document
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(model_name=embedder_folder())
    documents = [Document(p.text, metadata={"source": p.id}) for p in known]
    return FAISS.from_documents(documents, embeddings)


@pytest.fixture(scope="session")
def retriever(vectors: Any) -> Any:
    return vectors.as_retriever(search_kwargs={"k": 3})


@pytest.fixture
def engine(backbone: Backbone, gists: Path) -> Iterator[GistEngine]:
    """The tiny random model with gists of the known passages."""
    with GistEngine(backbone, _compressor(backbone), gists) as engine:
        yield engine


@pytest.fixture
def watch(
    known: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> Callable[[GistEngine], SeenPrompts]:
    """The prompts that an engine is given from here on."""

    def start(engine: GistEngine) -> SeenPrompts:
        seen, split = SeenPrompts(known), engine.segments

        def segments(*args: Any, **kwargs: Any) -> Any:
            found = split(*args, **kwargs)
            seen.add(found)
            return found

        monkeypatch.setattr(engine, "segments", segments)
        return seen

    return start


@pytest.fixture
def prompts(engine: GistEngine, watch: Callable[[GistEngine], SeenPrompts]) -> SeenPrompts:
    """The prompts that ``engine`` is given from here on."""
    return watch(engine)


@pytest.fixture
def stream_ends(engine: GistEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pieces each stream of ``engine`` had given when it ended."""
    ends: list[int] = []
    stream = engine.stream

    def counted(*args: Any, **kwargs: Any) -> Iterator[Any]:
        count = 0
        try:
            for piece in stream(*args, **kwargs):
                count += 1
                yield piece
        finally:
            ends.append(count)

    monkeypatch.setattr(engine, "stream", counted)
    return ends


def _compressor(backbone: Backbone) -> Any:
    return make_compressor("attention_matching", backbone, {"ratio": 4})
