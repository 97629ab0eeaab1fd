"""Filling the store on the way, with real MiniLM and FAISS, in chains that nobody changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, dynamic_prompt
from langchain_classic.chains import RetrievalQA, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.language_models import FakeMessagesListChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tools import create_retriever_tool, tool
from pydantic import BaseModel, Field

from gist_rag.engine import GistEngine
from gist_rag.rag import GistRAG
from gist_rag.types import Passage
from langchain_gist_rag import (
    ChatGist,
    GistCallbackHandler,
    GistDocumentCompressor,
    GistMiddleware,
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


@pytest.mark.parametrize(("by_event", "expected"), [(True, 3), (False, 0)])
def test_prompt_middleware_that_retrieves_by_event_fills_the_store(
    llm: ChatGist, vectors: Any, retriever: Any, hits: Hits, by_event: bool, expected: int
) -> None:
    """``similarity_search`` fires none: such documents are read as text until they are known."""

    @dynamic_prompt
    def with_context(request: Any) -> str:
        question = request.messages[-1].text
        found = retriever.invoke(question) if by_event else vectors.similarity_search(question, k=3)
        return f"Answer from:\n\n{join(found)}"

    agent = create_agent(llm, [], middleware=[GistMiddleware(llm), with_context])
    result = agent.invoke({"messages": [("human", QUESTION)]})
    assert hits() == [expected]
    assert result["gist"]["hits"] == expected


def test_middleware_that_adds_to_the_question_needs_a_filled_store(
    llm: ChatGist, vectors: Any, hits: Hits, known: list[Passage]
) -> None:
    llm.precompress([p.text for p in known])

    class Context(AgentMiddleware):
        def before_model(self, state: Any, runtime: Any) -> Any:
            last = state["messages"][-1]
            found = join(vectors.similarity_search(last.text, k=3))
            return {"messages": [HumanMessage(f"{last.text}\n\n{found}\n\nAnswer.", id=last.id)]}

    create_agent(llm, [], middleware=[Context()]).invoke({"messages": [("human", QUESTION)]})
    assert hits() == [3]


class SearchFirst(AgentMiddleware):
    """Has the model search before it answers, as a larger one does by itself."""

    def _forced(self, request: Any) -> Any:
        asked = isinstance(request.messages[-1], HumanMessage)
        return request.override(tool_choice="search" if asked else "none")

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        return handler(self._forced(request))

    async def awrap_model_call(self, request: Any, handler: Any) -> Any:
        return await handler(self._forced(request))


class Query(BaseModel):
    """Short, as a random model does not come to an end."""

    query: str = Field(max_length=20)


@pytest.fixture
def retriever_tool(retriever: Any) -> Any:
    search = create_retriever_tool(retriever, "search", "Search the documentation.")
    return search.model_copy(update={"args_schema": Query})


@pytest.fixture(params=["retriever tool", "artifact", "one document"])
def search(request: pytest.FixtureRequest, retriever_tool: Any, vectors: Any) -> Any:
    """Tools that retrieve, in the ways that LangChain's tutorials do."""
    if request.param == "retriever tool":
        return retriever_tool

    @tool(response_format="content_and_artifact", args_schema=Query)
    def search(query: str) -> Any:
        """Search the documentation."""
        found = vectors.similarity_search(query, k=3)
        if request.param == "one document":
            return f"Content: {found[0].page_content}", found[0]
        return "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in found), found

    return search


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
async def test_an_agent_reads_what_its_tool_found_as_gists(
    empty: GistEngine, search: Any, asynchronous: bool
) -> None:
    llm = ChatGist(engine=empty, max_tokens=120, temperature=1.5, seed=4)
    agent = create_agent(llm, [search], middleware=[GistMiddleware(llm), SearchFirst()])
    asked: Any = {"messages": [("human", QUESTION)]}
    result = await agent.ainvoke(asked) if asynchronous else agent.invoke(asked)
    question, call, found, answer = result["messages"]
    read = [m.response_metadata["gist"] for m in (call, answer)]
    passages = 1 if isinstance(found.artifact, Document) else 3
    assert [report["hits"] for report in read] == [0, passages]
    assert result["gist"] == {name: sum(report[name] for report in read) for name in result["gist"]}
    assert (question.text, found.name) == (QUESTION, "search")


def test_an_agent_may_compress_meanwhile(empty: GistEngine, retriever_tool: Any) -> None:
    llm = ChatGist(engine=empty, max_tokens=120, temperature=1.5, seed=4)
    later = GistMiddleware(llm, on_miss="background")
    agent = create_agent(llm, [retriever_tool], middleware=[later, SearchFirst()])
    first = agent.invoke({"messages": [("human", QUESTION)]})
    assert empty.wait_for_priming(60)
    again = agent.invoke({"messages": first["messages"][:3], "gist": first["gist"]})
    assert again["messages"][-1].response_metadata["gist"]["hits"] == 3
    assert again["gist"]["hits"] == first["gist"]["hits"] + 3


def test_an_agent_of_another_model_is_left_alone(empty: GistEngine) -> None:
    other = FakeMessagesListChatModel(responses=[AIMessage("Yes.")])
    agent = create_agent(other, [], middleware=[GistMiddleware(empty)])
    assert "gist" not in agent.invoke({"messages": [("human", QUESTION)]})


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
