"""RAG with LlamaIndex, unmodified: a query engine whose LLM reads passages as gists.

    python examples/llama_index_query_engine.py --limit 12

Prints what the query engine answers, and when the first token came from gists and from text.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from typing import Any

import faiss
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.faiss import FaissVectorStore

from gist_rag.models import DEFAULT_MODEL, embedder_folder
from gist_rag.retrieval import read_corpus
from llama_index.llms.gist_rag import GistLLM

QUESTIONS = (
    "How many columns does a 3-dimensional R*Tree virtual table have?",
    "What is the default maximum length of a LIKE or GLOB pattern?",
)


class PrintReading(BaseEventHandler):
    """Prints what the LLM read for each of its answers."""

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent):
            gist = event.response.raw["gist"]
            print(f"{gist['hits']} passages as gists, first token {gist['first_token_ms']:.0f} ms:")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="alias, folder or Hugging Face id")
    parser.add_argument("--limit", type=int, default=12, help="passages of the sample to compress")
    options = parser.parse_args()

    sample = str(files("gist_rag") / "data" / "sqlite_passages.jsonl")
    nodes = [TextNode(id_=p.id, text=p.text) for p in read_corpus(sample, limit=options.limit)]
    embedding = HuggingFaceEmbedding(model_name=embedder_folder())
    size = len(embedding.get_text_embedding("How long is a vector?"))
    vectors = FaissVectorStore(faiss_index=faiss.IndexFlatIP(size))
    storage = StorageContext.from_defaults(vector_store=vectors)
    index = VectorStoreIndex(nodes, storage_context=storage, embed_model=embedding)

    llm = GistLLM(model_name=options.model, ratio=8, max_new_tokens=24)
    print(llm.precompress(nodes, show_progress=True))
    as_text = GistLLM(engine=llm.engine, max_new_tokens=24, gist_mode="off")

    get_dispatcher().add_event_handler(PrintReading())
    for question in QUESTIONS:
        print(f"\n{question}")
        for reader in (as_text, llm):
            print(" ", index.as_query_engine(llm=reader, similarity_top_k=3).query(question))


if __name__ == "__main__":
    main()
