"""A LlamaIndex LLM that reads precompressed gists of known passages.

>>> from llama_index.llms.gist_rag import GistLLM
>>> llm = GistLLM(store="./gists")
>>> llm.precompress(nodes)
>>> index.as_query_engine(llm=llm).query("What is SQLite?")
"""

from gist_rag.errors import MissingExtra

try:
    from llama_index.llms.gist_rag.base import GistLLM
    from llama_index.llms.gist_rag.filling import (
        GistNodePostprocessor,
        GistRetrievalHandler,
        GistTransform,
        gist_capture,
    )
    from llama_index.llms.gist_rag.prompt_helper import GistPromptHelper
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("llama_index.core"):
        raise
    raise MissingExtra("llama-index-core", "llama-index") from error

__all__ = [
    "GistLLM",
    "GistNodePostprocessor",
    "GistPromptHelper",
    "GistRetrievalHandler",
    "GistTransform",
    "gist_capture",
]
