"""Filling the store on the way, with real MiniLM and FAISS, in chains that nobody changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_classic.chains import RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool, tool
from langchain_core.vectorstores import VectorStoreRetriever

from gist_rag.engine import GistEngine
from gist_rag.models import embedder_folder
from gist_rag.rag import GistRAG
from gist_rag.types import Passage
from langchain_gist_rag import (
    ChatGist,
    GistCallbackHandler,
    GistDocumentCompressor,
    GistRetriever,
    ensure_gists,
    gist_capture,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`langchain-community` is being sunset:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::langchain_core._api.LangChainDeprecationWarning"),
]

QUESTION = "When does a COMMIT occur?"
PROMPT = ChatPromptTemplate.from_messages(
    [("system", "Answer from the context:\n\n{context}"), ("human", "{input}")]
)
Hits = Callable[[], list[int]]


@pytest.fixture(scope="module")
def vectors(known: list[Passage]) -> Any:
    from langchain_community.vectorstores import FAISS
    from langchain_huggingface import HuggingFaceEmbeddings

    embeddings = HuggingFaceEmbeddings(model_name=embedder_folder())
    documents = [Document(p.text, metadata={"source": p.id}) for p in known]
    return FAISS.from_documents(documents, embeddings)


@pytest.fixture(scope="module")
def retriever(vectors: Any) -> VectorStoreRetriever:
    return vectors.as_retriever(search_kwargs={"k": 3})


@pytest.fixture
def empty(make_engine: Any) -> GistEngine:
    """An engine that has no gist yet."""
    return make_engine(settings={"ratio": 4})


@pytest.fixture
def llm(empty: GistEngine) -> ChatGist:
    return ChatGist(engine=empty, max_tokens=4, temperature=1.5, seed=4)


@pytest.fixture
def hits(llm: ChatGist, monkeypatch: pytest.MonkeyPatch) -> Hits:
    """Passages read as gists, per prompt so far."""
    seen: list[int] = []
    segments = llm.engine.segments

    def counted(*args: Any, **kwargs: Any) -> Any:
        found = segments(*args, **kwargs)
        seen.append(sum(type(s).__name__ == "Known" for s in found))
        return found

    monkeypatch.setattr(llm.engine, "segments", counted)
    return lambda: seen


def join(documents: list[Document]) -> str:
    return "\n\n".join(d.page_content for d in documents)


def lcel(retriever: Any, llm: ChatGist) -> Any:
    return {"context": retriever | join, "input": RunnablePassthrough()} | PROMPT | llm


# ---- ways to fill the store


def test_nothing_is_read_as_gist_before(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    lcel(retriever, llm).invoke(QUESTION)
    assert hits() == [0]


def test_a_step_of_the_chain(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    lcel(retriever | ensure_gists(llm), llm).invoke(QUESTION)
    assert hits() == [3]


async def test_a_step_of_an_async_chain(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    chain = lcel(retriever | ensure_gists(llm), llm)
    await chain.ainvoke(QUESTION)
    [chunk async for chunk in chain.astream(QUESTION)]
    assert hits() == [3, 3]


def test_a_document_compressor(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    compressing = ContextualCompressionRetriever(
        base_compressor=GistDocumentCompressor(llm=llm), base_retriever=retriever
    )
    stuff = create_stuff_documents_chain(llm, PROMPT)
    result = create_retrieval_chain(compressing, stuff).invoke({"input": QUESTION})
    assert hits() == [3]
    assert result["context"] == retriever.invoke(QUESTION)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
async def test_a_callback_handler(
    llm: ChatGist, retriever: Any, hits: Hits, asynchronous: bool
) -> None:
    chain = create_retrieval_chain(retriever, create_stuff_documents_chain(llm, PROMPT))
    config: Any = {"callbacks": [GistCallbackHandler(llm)]}
    if asynchronous:
        await chain.ainvoke({"input": QUESTION}, config)
    else:
        chain.invoke({"input": QUESTION}, config)
    assert hits() == [3]


def test_capturing_needs_no_change_at_all(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    qa = RetrievalQA.from_chain_type(llm, retriever=retriever)
    with gist_capture(llm):
        qa.invoke(QUESTION)
    assert hits() == [3]


def test_capturing_ends_with_its_block(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    with gist_capture(llm):
        pass
    lcel(retriever, llm).invoke(QUESTION)
    assert hits() == [0]


def test_in_the_background_the_second_question_profits(
    llm: ChatGist, retriever: Any, hits: Hits
) -> None:
    chain = lcel(retriever, llm)
    with gist_capture(llm, on_miss="background"):
        retriever.invoke(QUESTION)
        assert llm.engine.wait_for_priming(30)
        chain.invoke(QUESTION)
    assert hits() == [3]


# ---- agents


def test_prompt_middleware_needs_a_filled_store(
    llm: ChatGist, vectors: Any, hits: Hits, known: list[Passage]
) -> None:
    llm.precompress([p.text for p in known])

    @dynamic_prompt
    def with_context(request: Any) -> str:
        question = request.messages[-1].text
        return f"Answer from:\n\n{join(vectors.similarity_search(question, k=3))}"

    agent = create_agent(llm, [], middleware=[with_context])
    agent.invoke({"messages": [("human", QUESTION)]})
    assert hits() == [3]


def test_retriever_tool_and_handler(llm: ChatGist, retriever: Any, hits: Hits) -> None:
    search = create_retriever_tool(retriever, "search", "Search the documentation.")
    handler = GistCallbackHandler(llm)
    text = search.invoke({"query": QUESTION}, {"callbacks": [handler]})
    llm.bind_tools([search]).invoke(_history(ToolMessage(text, tool_call_id="1")))
    assert hits() == [3]


def test_tool_with_artifact_needs_no_retriever_event(
    empty: GistEngine, vectors: Any, hits: Hits, llm: ChatGist
) -> None:
    @tool(response_format="content_and_artifact")
    def search(query: str) -> Any:
        """Search the documentation."""
        found = vectors.similarity_search(query, k=2)
        return "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in found), found

    call = {"name": "search", "args": {"query": QUESTION}, "id": "1", "type": "tool_call"}
    history = _history(search.invoke(call))
    agent = create_agent(ChatGist(engine=empty, on_miss="inline", max_tokens=4), [search])
    agent.invoke({"messages": history})
    assert hits() == [2]


def _history(result: Any) -> list[Any]:
    call = {"name": "search", "args": {"query": QUESTION}, "id": "1"}
    return [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), result]


# ---- from FAISS row to gist


def test_a_retriever_over_the_gists_themselves(
    llm: ChatGist, hits: Hits, known: list[Passage]
) -> None:
    rag = GistRAG(llm.engine)
    rag.build(known)
    retriever = GistRetriever(rag=rag, k=3)
    lcel(retriever, llm).invoke(QUESTION)
    assert hits() == [3]
    document = retriever.invoke(QUESTION)[0]
    assert document.metadata["source"] in {p.id for p in known}
    assert document.metadata["score"] > 0.2
