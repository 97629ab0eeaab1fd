"""Filling a store on the way: whatever a chain retrieves is given a gist before it is read.

All of them leave the documents as they are; what happens with one that has no gist says
``on_miss``. Errors are logged, and the document is read as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tracers.context import register_configure_hook
from pydantic import ConfigDict, Field

from gist_rag.modes import OnMiss
from langchain_gist_rag._common import documents_of, to_passages


class GistDocumentCompressor(BaseDocumentCompressor):
    """A document compressor that compresses into the store, and hands the documents on as they are.

    Example:
        >>> compressor = GistDocumentCompressor(llm=llm)
        >>> ContextualCompressionRetriever(base_compressor=compressor, base_retriever=retriever)
    """

    llm: Any = Field(repr=False)
    """The ``ChatGist`` or ``GistLLM`` that will read, or its ``GistEngine``."""
    on_miss: OnMiss = "inline"

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """The same documents, of which each now has a gist."""
        return prime(self.llm, documents, self.on_miss)


def ensure_gists(llm: Any, on_miss: OnMiss = "inline") -> Runnable[list[Document], list[Document]]:
    """A step of a chain that documents pass unchanged: ``retriever | ensure_gists(llm) | ...``.

    Args:
        llm: the ``ChatGist`` or ``GistLLM`` that will read, or its ``GistEngine``.
    """
    return RunnableLambda(lambda documents: prime(llm, documents, on_miss), name="ensure_gists")


class GistCallbackHandler(BaseCallbackHandler):
    """Sees what retrievers and tools return: ``chain.invoke(..., {"callbacks": [handler]})``.

    In async chains it works in a thread and the chain waits for it, not the event loop.

    Args:
        llm: the ``ChatGist`` or ``GistLLM`` that will read, or its ``GistEngine``.
    """

    def __init__(self, llm: Any, on_miss: OnMiss = "inline") -> None:
        self.llm = llm
        self.on_miss: OnMiss = on_miss

    def on_retriever_end(self, documents: Sequence[Document], **_: Any) -> None:
        """Documents were retrieved."""
        prime(self.llm, documents, self.on_miss)

    def on_tool_end(self, output: Any, **_: Any) -> None:
        """A tool returned; documents may stand beside its text."""
        prime(self.llm, documents_of(output), self.on_miss)


@contextmanager
def gist_capture(llm: Any, on_miss: OnMiss = "inline") -> Iterator[GistCallbackHandler]:
    """A ``GistCallbackHandler`` for all that runs inside, with nothing changed in the chains."""
    handler = GistCallbackHandler(llm, on_miss)
    before = _captured.set(handler)
    try:
        yield handler
    finally:
        _captured.reset(before)


_captured: ContextVar[GistCallbackHandler | None] = ContextVar("gist_capture", default=None)
register_configure_hook(_captured, inheritable=True)


def prime(llm: Any, documents: Sequence[Document], on_miss: OnMiss) -> list[Document]:
    """Show documents to the engine of a model, or to an engine."""
    getattr(llm, "engine", llm).prime(to_passages(documents), on_miss)
    return list(documents)
