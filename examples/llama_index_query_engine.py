"""RAG with LlamaIndex, unmodified: the LLM of a query engine reads passages as gists.

Prints what the query engine answers, and when the first token came from text and from gists.
"""

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

from gist_rag.models import DEFAULT_EMBEDDER, DEFAULT_RAG_MODEL, embedder_folder
from gist_rag.retrieval import read_corpus
from llama_index.llms.gist_rag import GistLLM

QUESTION = "What is the default maximum length in bytes of a LIKE or GLOB pattern in SQLite?"


class PrintReading(BaseEventHandler):
    """Prints what the LLM read for each of its answers; query engines do not hand it on."""

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent):
            gist = event.response.raw["gist"]
            print(f"{gist['hits']} passages as gists, first token {gist['first_token_ms']:.0f} ms:")


def main(model: str, limit: int) -> None:
    sample = str(files("gist_rag") / "data" / "sqlite_passages.jsonl")
    nodes = [TextNode(id_=p.id, text=p.text) for p in read_corpus(sample, limit=limit)]
    embedding = HuggingFaceEmbedding(model_name=embedder_folder())
    size = len(embedding.get_text_embedding(QUESTION))
    vectors = FaissVectorStore(faiss_index=faiss.IndexFlatIP(size))
    storage = StorageContext.from_defaults(vector_store=vectors)
    index = VectorStoreIndex(nodes, storage_context=storage, embed_model=embedding)

    llm = GistLLM(model_name=model, ratio=4, judge=DEFAULT_EMBEDDER, max_new_tokens=32)
    print(llm.precompress(nodes, show_progress=True))

    print(f"\n{QUESTION}")
    get_dispatcher().add_event_handler(PrintReading())
    for reader in (GistLLM(engine=llm.engine, max_new_tokens=32, gist_mode="off"), llm):
        print(" ", index.as_query_engine(llm=reader, similarity_top_k=3).query(QUESTION))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default=DEFAULT_RAG_MODEL, help="alias, folder or Hugging Face id"
    )
    parser.add_argument("--limit", type=int, default=8, help="passages of the sample to compress")
    main(**vars(parser.parse_args()))
