"""What fills the store: ingestion, postprocessor, retrieval events. The chains stay as they are."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import faiss
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.indices.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.faiss import FaissVectorStore

from gist_rag.errors import BadInput, StoreLocked
from gist_rag.models import embedder_folder
from gist_rag.store import GistStore
from gist_rag.types import normalise
from llama_index.llms.gist_rag import (
    GistLLM,
    GistNodePostprocessor,
    GistRetrievalHandler,
    GistTransform,
    gist_capture,
)

QUESTION = "When does a COMMIT occur?"


@pytest.fixture
def llm(make_engine: Any) -> GistLLM:
    """Over an empty store."""
    return GistLLM(engine=make_engine(settings={"ratio": 4}), max_new_tokens=4)


@pytest.fixture
def prompts(llm: GistLLM, watch: Any) -> Any:
    return watch(llm.engine)


@pytest.fixture(scope="session")
def embedding() -> HuggingFaceEmbedding:
    return HuggingFaceEmbedding(model_name=embedder_folder())


@pytest.fixture
def nodes(known: Any) -> list[TextNode]:
    return [TextNode(id_=p.id, text=p.text, metadata={"file_name": f"{p.id}.md"}) for p in known]


@pytest.fixture
def make_index(embedding: Any) -> Any:
    def make(nodes: list[Any]) -> VectorStoreIndex:
        vectors = FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
        storage = StorageContext.from_defaults(vector_store=vectors)
        return VectorStoreIndex(nodes, storage_context=storage, embed_model=embedding)

    return make


def entries(llm: GistLLM) -> int:
    return llm.engine.store.stats().entries


# ---- ingestion


def test_ingested_nodes_come_out_unchanged_and_have_gists(
    llm: GistLLM, prompts: Any, nodes: Any, make_index: Any
) -> None:
    before = [(node.node_id, node.hash, node.to_dict()) for node in nodes]
    ingested = IngestionPipeline(transformations=[GistTransform(llm=llm)]).run(nodes=nodes)
    assert [(node.node_id, node.hash, node.to_dict()) for node in ingested] == before
    make_index(ingested).as_query_engine(llm=llm, similarity_top_k=3).query(QUESTION)
    assert [len(found) for found in prompts.gists] == [3]
    assert prompts.no_passage_as_text()


async def test_awaited_ingestion_compresses_what_the_splitter_made(
    llm: GistLLM, known: Any, embedding: Any
) -> None:
    document = Document(text="\n\n".join(p.text for p in known[:3]))
    splitter = SentenceSplitter(chunk_size=128, chunk_overlap=0)
    pipeline = IngestionPipeline(transformations=[splitter, GistTransform(llm=llm), embedding])
    ingested = await pipeline.arun(documents=[document])
    assert entries(llm) == len(ingested) > 3
    assert all(llm.engine.matcher.find(n.get_content(MetadataMode.NONE)) for n in ingested)


def test_a_pipeline_with_a_cache_fills_every_store(make_engine: Any, nodes: Any) -> None:
    cache = IngestionCache()
    stores = [make_engine(settings={"ratio": 4}, store=None, namespace=n) for n in ("a", "a", "b")]
    for engine in stores:
        transform = GistTransform(llm=GistLLM(engine=engine))
        IngestionPipeline(transformations=[transform], cache=cache).run(nodes=nodes[:2])
    assert [len(engine.store.contents(engine.space)) for engine in stores] == [2, 2, 2]
    assert len(cache.cache.get_all(cache.collection)) == 2


def test_nodes_without_text_are_passed_on(llm: GistLLM, nodes: Any) -> None:
    nodes = [TextNode(text="  "), *nodes[:1]]
    assert GistTransform(llm=llm)(nodes) is nodes
    assert GistTransform(llm=llm)(nodes[:1]) == nodes[:1]
    assert entries(llm) == 1


def test_ingestion_waits_for_another_writer(llm: GistLLM, nodes: Any) -> None:
    with GistStore.open(llm.engine.store.path) as other:
        other.add_space("other", {})
        with pytest.raises(StoreLocked):
            GistTransform(llm=llm, lock_timeout_s=0)(nodes[:1])
        threading.Timer(0.3, other.release).start()
        GistTransform(llm=llm)(nodes[:1])
    assert entries(llm) == 1


def test_ingestion_in_several_processes_needs_a_store_with_a_name(
    llm: GistLLM, tmp_path: Any
) -> None:
    with pytest.raises(BadInput, match="num_workers"):
        pickle.dumps(GistTransform(llm=llm))
    named = GistTransform(llm=GistLLM(store=tmp_path, ratio=4), show_progress=True)
    again = pickle.loads(pickle.dumps(named))
    assert again.to_dict() == named.to_dict() == GistTransform.from_dict(named.to_dict()).to_dict()
    assert (again.llm.store, again.llm.ratio) == (str(tmp_path), 4)


@pytest.mark.slow
def test_ingestion_in_several_processes_fills_one_store(
    tiny_model_folder: Any, tmp_path: Any, nodes: Any
) -> None:
    llm = GistLLM(model_name=str(tiny_model_folder), store=tmp_path / "made", ratio=4)
    IngestionPipeline(transformations=[GistTransform(llm=llm)]).run(nodes=nodes, num_workers=2)
    assert entries(llm) == len(nodes)


# ---- after retrieval


def test_postprocessor_gives_retrieved_nodes_gists(
    llm: GistLLM, prompts: Any, nodes: Any, make_index: Any
) -> None:
    engine = make_index(nodes).as_query_engine(
        llm=llm, similarity_top_k=3, node_postprocessors=[GistNodePostprocessor(llm=llm)]
    )
    response = engine.query(QUESTION)
    assert prompts.gists == [[n.node_id for n in response.source_nodes]]
    assert entries(llm) == 3


def test_postprocessor_compresses_what_the_ones_before_it_made(
    llm: GistLLM, known: Any, make_index: Any, watch: Any
) -> None:
    parser = SentenceWindowNodeParser.from_defaults(window_size=1)
    index = make_index(parser.get_nodes_from_documents([Document(text=known[0].text)]))
    engine = index.as_query_engine(
        llm=llm,
        similarity_top_k=1,
        node_postprocessors=[
            MetadataReplacementPostProcessor(target_metadata_key="window"),
            GistNodePostprocessor(llm=llm),
        ],
    )
    [source] = engine.query(QUESTION).source_nodes
    assert len(llm.engine.matcher.find(source.text)) == 1


@pytest.mark.parametrize("window", [1, 99])
def test_sentence_windows_over_whole_documents(
    llm: GistLLM, prompts: Any, known: Any, make_index: Any, window: int
) -> None:
    """A window that is all of a document has the document's gist; a part of it is another text, and
    gets one where the postprocessor stands last."""
    llm.precompress([Document(text=p.text) for p in known[:3]])
    parser = SentenceWindowNodeParser.from_defaults(window_size=window)
    documents = [Document(text=p.text) for p in known[:3]]
    index = make_index(parser.get_nodes_from_documents(documents))
    replaced = MetadataReplacementPostProcessor(target_metadata_key="window")

    def ask(*after: Any) -> tuple[int, list[str]]:
        chosen = [replaced, *after]
        engine = index.as_query_engine(llm=llm, similarity_top_k=2, node_postprocessors=chosen)
        found = engine.query(QUESTION).source_nodes
        return len(prompts.gists[-1]), [node.text for node in found]

    hits, texts = ask()
    whole = {normalise(p.text) for p in known[:3]}
    assert all((normalise(text) in whole) == (window == 99) for text in texts)
    assert hits == (len(texts) if window == 99 else 0)
    assert ask(GistNodePostprocessor(llm=llm))[0] == len(texts) == 2


def test_postprocessor_in_the_background_does_not_wait(llm: GistLLM, nodes: Any) -> None:
    found = [NodeWithScore(node=node) for node in nodes[:2]]
    post = GistNodePostprocessor(llm=llm, on_miss="background")
    assert post.postprocess_nodes(found) == found
    assert llm.engine.wait_for_priming(60)
    assert entries(llm) == 2


def test_a_passage_that_cannot_be_compressed_does_not_spoil_the_answer(
    llm: GistLLM, nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    long = TextNode(text="word " * 20_000)
    GistNodePostprocessor(llm=llm).postprocess_nodes(
        [NodeWithScore(node=node) for node in (long, nodes[0])]
    )
    assert entries(llm) == 1
    assert "a passage stays text" in caplog.text


# ---- retrieval events


async def test_handler_primes_what_is_retrieved_and_then_goes(
    llm: GistLLM, prompts: Any, nodes: Any, make_index: Any
) -> None:
    engine = make_index(nodes).as_query_engine(llm=llm, similarity_top_k=3)
    engine.query(QUESTION)
    with gist_capture(llm, on_miss="inline"):
        engine.query(QUESTION)
        await engine.aquery(QUESTION)
    assert [len(found) for found in prompts.gists] == [0, 3, 3]
    engine.query("What is the maximum length of a LIKE pattern?")
    assert entries(llm) == 3


def test_handler_primes_in_the_background_by_default(
    llm: GistLLM, prompts: Any, nodes: Any, make_index: Any
) -> None:
    engine = make_index(nodes).as_query_engine(llm=llm, similarity_top_k=3)
    with gist_capture(llm) as handler:
        assert isinstance(handler, GistRetrievalHandler)
        engine.query(QUESTION)
    assert llm.engine.wait_for_priming(60)
    engine.query(QUESTION)
    assert len(prompts.gists[-1]) == 3
