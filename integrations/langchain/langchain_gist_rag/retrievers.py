"""``GistRetriever``: from a question by FAISS row to passages that have gists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field

if TYPE_CHECKING:
    from gist_rag.rag import Found


class GistRetriever(BaseRetriever):
    """Retrieves from the index that lies beside the gists, so that every hit is read as one.

    Example:
        >>> rag = GistRAG.open("./gists")
        >>> llm, retriever = ChatGist(engine=rag.engine), GistRetriever(rag=rag, k=5)
    """

    rag: Any = Field(repr=False, exclude=True)
    """A ``GistRAG``, made with ``GistRAG.open`` or filled with ``build``."""
    k: int = Field(default=5, ge=1)
    """How many documents; may be given per call."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self.rag.search(query, self.k if k is None else k)
        return [_document(hit) for hit in found]


def _document(hit: Found) -> Document:
    passage = hit.passage
    metadata = {"source": passage.id, **passage.metadata, "score": hit.score}
    return Document(passage.text, id=passage.id or None, metadata=metadata)
