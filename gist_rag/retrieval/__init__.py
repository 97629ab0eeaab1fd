"""From a corpus file to passages, and from a question to the content keys of passages."""

from gist_rag.retrieval.chunking import read_corpus, split
from gist_rag.retrieval.embed import Embedder, SentenceEmbedder, Vectors
from gist_rag.retrieval.index import Hit, VectorIndex

__all__ = [
    "Embedder",
    "Hit",
    "SentenceEmbedder",
    "VectorIndex",
    "Vectors",
    "read_corpus",
    "split",
]
