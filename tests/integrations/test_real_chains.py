"""Chains with real embeddings, FAISS and the embedded model; and the examples, as they stand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.models import embedder_folder
from gist_rag.reader import Reader
from gist_rag.types import Passage

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTION = "What is the default maximum length in bytes of a LIKE or GLOB pattern in SQLite?"
GOLD = "50000"


@pytest.fixture(scope="module")
def corpus(passages: list[Passage]) -> list[Passage]:
    """Four passages, the third of which holds the answer."""
    return passages[3:7]


@pytest.fixture(scope="module")
def real_engine(
    embedded_backbone: Backbone,
    embedded_reader: Reader,
    corpus: list[Passage],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[GistEngine]:
    """The embedded model and its reader, with gists of the corpus at 4x."""
    compressor = make_compressor("attention_matching", embedded_backbone, {"ratio": 4})
    folder = tmp_path_factory.mktemp("real")
    with GistEngine(embedded_backbone, compressor, folder, reader=embedded_reader) as engine:
        engine.precompute(corpus)
        yield engine


@pytest.mark.model
@pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning")
def test_langchain_answers_from_gists(real_engine: GistEngine, corpus: list[Passage]) -> None:
    from langchain_classic.chains import create_retrieval_chain
    from langchain_classic.chains.combine_documents import create_stuff_documents_chain
    from langchain_community.vectorstores import FAISS
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_huggingface import HuggingFaceEmbeddings

    from langchain_gist_rag import ChatGist

    embeddings = HuggingFaceEmbeddings(model_name=embedder_folder())
    vectors = FAISS.from_texts([p.text for p in corpus], embeddings)
    prompt = ChatPromptTemplate([("human", "Documents:\n\n{context}\n\nQuestion: {input}")])
    llm = ChatGist(engine=real_engine, gist_mode="require", max_tokens=32)
    chain = create_retrieval_chain(
        vectors.as_retriever(search_kwargs={"k": 3}), create_stuff_documents_chain(llm, prompt)
    )
    result = chain.invoke({"input": QUESTION})
    assert GOLD in result["answer"]
    texts = "\n\n".join(d.page_content for d in result["context"])
    answer = llm.invoke(prompt.invoke({"context": texts, "input": QUESTION}))
    assert answer.text == result["answer"]
    assert answer.response_metadata["gist"]["hits"] == 3
    assert answer.response_metadata["gist"]["ratio"] == pytest.approx(4, rel=0.05)


@pytest.mark.model
def test_llama_index_answers_from_gists(real_engine: GistEngine, corpus: list[Passage]) -> None:
    import faiss
    from llama_index.core import StorageContext, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding
    from llama_index.vector_stores.faiss import FaissVectorStore

    from llama_index.llms.gist_rag import GistLLM

    index = VectorStoreIndex(
        [TextNode(text=p.text) for p in corpus],
        storage_context=StorageContext.from_defaults(
            vector_store=FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
        ),
        embed_model=HuggingFaceEmbedding(model_name=embedder_folder()),
    )
    llm = GistLLM(engine=real_engine, gist_mode="require", max_new_tokens=32)
    answer = index.as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert GOLD in str(answer)
    prompt = "\n\n".join([*(n.text for n in answer.source_nodes), QUESTION])
    assert llm.complete(prompt, max_tokens=1).raw["gist"]["hits"] == 3


@pytest.mark.parametrize("name", ["langchain_chain.py", "llama_index_query_engine.py"])
def test_example_runs_as_it_stands(name: str, tiny_model_folder: Path) -> None:
    command = [sys.executable, EXAMPLES / name, "--model", tiny_model_folder, "--limit", "4"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "0 passages as gists" in ended.stdout
    assert "3 passages as gists" in ended.stdout
