"""LangChain models that read precompressed gists of known passages.

    >>> from langchain_gist_rag import ChatGist
    >>> llm = ChatGist(store="./gists")
    >>> llm.precompress(documents)
    >>> chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, prompt))

Names are imported on first use, so that ``import langchain_gist_rag`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gist_rag import __version__
from gist_rag.errors import MissingExtra

if TYPE_CHECKING:
    from langchain_gist_rag.agents import GistMiddleware
    from langchain_gist_rag.chat_models import ChatGist
    from langchain_gist_rag.llms import GistLLM
    from langchain_gist_rag.priming import (
        GistCallbackHandler,
        GistDocumentCompressor,
        ensure_gists,
        gist_capture,
    )
    from langchain_gist_rag.retrievers import GistRetriever

_HOMES = {
    "ChatGist": "chat_models",
    "GistCallbackHandler": "priming",
    "GistDocumentCompressor": "priming",
    "GistLLM": "llms",
    "GistMiddleware": "agents",
    "GistRetriever": "retrievers",
    "ensure_gists": "priming",
    "gist_capture": "priming",
}

_EXTRAS = {"langchain_core": "langchain", "langchain": "agents", "langgraph": "agents"}

__all__ = [
    "ChatGist",
    "GistCallbackHandler",
    "GistDocumentCompressor",
    "GistLLM",
    "GistMiddleware",
    "GistRetriever",
    "__version__",
    "ensure_gists",
    "gist_capture",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'langchain_gist_rag' has no attribute {name!r}")
    try:
        return getattr(import_module(f"langchain_gist_rag.{_HOMES[name]}"), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        raise MissingExtra(package.replace("_", "-"), _EXTRAS[package]) from error
