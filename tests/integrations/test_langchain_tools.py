"""Tools and structured output in LangChain, over a tiny random model kept to the form."""

from __future__ import annotations

import json
from typing import Any, TypedDict

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from gist_rag.errors import BadInput
from langchain_gist_rag import ChatGist, GistLLM

QUESTION = "When does a COMMIT occur?"


class Point(BaseModel):
    """A point."""

    x: int = Field(ge=0, le=9)
    up: bool


class PointDict(TypedDict):
    """A point."""

    x: int
    up: bool


@tool
def weather(day: int) -> str:
    """The weather on a day."""
    return f"sunny on day {day}"


@tool
def clock() -> str:
    """The time."""
    return "noon"


TOOLS = [weather, clock]
SAMPLING = {"temperature": 1.5, "seed": 4, "max_tokens": 120}


@pytest.fixture
def llm(engine: Any) -> ChatGist:
    return ChatGist(engine=engine, **SAMPLING)


# ---- tool calls


@pytest.mark.parametrize("choice", ["any", "required", True])
def test_a_call_can_be_forced(llm: ChatGist, choice: Any) -> None:
    answer = llm.bind_tools(TOOLS, tool_choice=choice).invoke(QUESTION)
    [call] = answer.tool_calls
    assert call["name"] in ("weather", "clock")
    assert call["id"].startswith("call_")
    assert answer.content == ""
    assert answer.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "choice", ["clock", {"type": "function", "function": {"name": "clock"}}], ids=["name", "dict"]
)
def test_one_tool_can_be_forced(llm: ChatGist, choice: Any) -> None:
    answer = llm.bind_tools(TOOLS, tool_choice=choice).invoke(QUESTION)
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [("clock", {})]


def test_no_tool_is_offered_where_none_may_be_called(llm: ChatGist, prompts: Any) -> None:
    answer = llm.bind_tools(TOOLS, tool_choice="none").invoke(QUESTION, max_tokens=4)
    assert answer.tool_calls == []
    assert "weather" not in prompts.texts[0]


def test_a_tool_that_is_not_bound_cannot_be_forced(llm: ChatGist) -> None:
    with pytest.raises(BadInput, match="'sun'; it must be a bound tool"):
        llm.bind_tools(TOOLS, tool_choice="sun")


def test_free_answers_are_calls_or_words(llm: ChatGist) -> None:
    for seed in range(3):
        answer = llm.bind_tools(TOOLS).invoke(QUESTION, seed=seed, max_tokens=12)
        assert answer.content or answer.tool_calls
        assert answer.invalid_tool_calls == []


def test_streamed_calls_are_those_of_invoke(llm: ChatGist) -> None:
    bound = llm.bind_tools(TOOLS, tool_choice="weather")
    whole, total = bound.invoke(QUESTION), AIMessageChunk(content="")
    chunks = list(bound.stream(QUESTION))
    for chunk in chunks:
        total += chunk
    strip = lambda message: [(c["name"], c["args"]) for c in message.tool_calls]
    assert strip(total) == strip(whole)
    assert sum(bool(chunk.tool_call_chunks) for chunk in chunks) > 3
    assert len({c["id"] for chunk in chunks for c in chunk.tool_call_chunks} - {None}) == 1


def test_a_call_that_is_cut_off_is_invalid(llm: ChatGist) -> None:
    answer = llm.bind_tools(TOOLS, tool_choice="weather").invoke(QUESTION, max_tokens=25)
    assert answer.tool_calls == []
    assert len(answer.invalid_tool_calls) <= 1
    assert answer.response_metadata["finish_reason"] == "length"


def test_tools_are_described_once_and_counted(llm: ChatGist, prompts: Any) -> None:
    llm.bind_tools(TOOLS, tool_choice="any").invoke(QUESTION)
    assert prompts.texts[0].count('"name": "weather"') == 1
    plain = llm.get_num_tokens_from_messages([HumanMessage(QUESTION)])
    assert llm.get_num_tokens_from_messages([HumanMessage(QUESTION)], tools=TOOLS) > 2 * plain


def test_an_agent_goes_round(engine: Any, prompts: Any, known: Any) -> None:
    """A retrieval tool's text is read as a gist when the agent comes back with it."""

    @tool(response_format="content_and_artifact")
    def search(query: str) -> Any:
        """Search the documentation."""
        return f"Source: {known[0].id}\nContent: {known[0].text}", []

    llm = ChatGist(engine=engine, **SAMPLING)
    agent = create_agent(llm, [search])
    found = search.invoke(
        {"name": "search", "args": {"query": "x"}, "id": "1", "type": "tool_call"}
    )
    call = {"name": "search", "args": {"query": "x"}, "id": "1"}
    history = [HumanMessage(QUESTION), AIMessage("", tool_calls=[call]), found]
    agent.invoke({"messages": history}, {"recursion_limit": 50})
    assert prompts.gists[0] == [known[0].id]


def test_documents_beside_a_tool_result_are_compressed_on_demand(
    make_engine: Any, passages: Any
) -> None:
    from langchain_core.documents import Document

    llm = ChatGist(engine=make_engine(settings={"ratio": 4}), on_miss="inline", max_tokens=4)
    documents = [Document(p.text, metadata={"source": p.id}) for p in passages[:2]]
    text = "\n\n".join(f"Source: {d.metadata}\nContent: {d.page_content}" for d in documents)
    history = [
        HumanMessage(QUESTION),
        AIMessage("", tool_calls=[{"name": "search", "args": {}, "id": "1"}]),
        ToolMessage(text, tool_call_id="1", artifact=documents),
    ]
    assert llm.invoke(history).response_metadata["gist"]["hits"] == 2


# ---- structured output


@pytest.mark.parametrize("schema", [Point, PointDict, Point.model_json_schema()], ids=str)
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_are_of_the_schema(llm: ChatGist, schema: Any, method: str) -> None:
    answer = llm.with_structured_output(schema, method=method).invoke(QUESTION)
    point = answer.model_dump() if schema is Point else answer
    assert point.keys() == {"x", "up"}


async def test_structured_answers_stream_and_await(llm: ChatGist) -> None:
    structured = llm.with_structured_output(Point)
    *_, last = structured.stream(QUESTION)
    assert isinstance(last, Point)
    assert isinstance(await structured.ainvoke(QUESTION), Point)


def test_raw_answers_come_along(llm: ChatGist) -> None:
    both = llm.with_structured_output(Point, include_raw=True)
    good, cut = both.invoke(QUESTION), both.bind(max_tokens=1).invoke(QUESTION)
    assert json.loads(good["raw"].content) == good["parsed"].model_dump()
    assert good["parsing_error"] is None
    assert isinstance(llm.invoke(QUESTION, max_tokens=1), AIMessage)
    assert cut.keys() == good.keys()


def test_json_mode_gives_any_object(llm: ChatGist) -> None:
    model = llm.with_structured_output(PointDict, method="json_mode").first  # type: ignore[attr-defined]
    assert model.invoke(QUESTION).content.startswith("{")


def test_unknown_methods_and_formats_are_refused(llm: ChatGist) -> None:
    with pytest.raises(BadInput, match="not 'xml'"):
        llm.with_structured_output(Point, method="xml")
    with pytest.raises(BadInput, match="its type must be"):
        llm.invoke(QUESTION, response_format={"type": "xml"})


def test_an_agent_answers_in_a_schema(llm: ChatGist) -> None:
    agent = create_agent(llm, [], response_format=Point)
    assert isinstance(
        agent.invoke({"messages": [("human", QUESTION)]})["structured_response"], Point
    )


def test_any_call_can_be_constrained(engine: Any) -> None:
    from gist_rag.constrain import Constraint

    either = Constraint.choices(["yes", "no"])
    assert ChatGist(engine=engine).invoke(QUESTION, constraint=either).content in ("yes", "no")
    assert GistLLM(engine=engine).invoke(QUESTION, constraint=either) in ("yes", "no")


def test_profile_says_what_the_model_can(llm: ChatGist) -> None:
    assert llm.profile["tool_calling"]
    assert llm.profile["structured_output"]
    assert llm.profile["max_input_tokens"] == 4096
    assert not llm.profile["image_inputs"]
