"""Function calling and structured output over a tiny random model, held to form by grammars."""

from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import TextBlock, ToolCallBlock
from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel

from gist_rag.errors import BadInput
from llama_index.llms.gist_rag import GistLLM
from llama_index.llms.gist_rag.messages import AnswerReader

Side = Literal["left", "right"]


class Step(BaseModel):
    """One step."""

    side: Side
    far: bool


def go(side: Side) -> str:
    """Go to a side."""
    return f"went {side}"


def stop(now: bool) -> str:
    """Stop."""
    return "stopped"


TOOLS = [FunctionTool.from_defaults(go), FunctionTool.from_defaults(stop)]


@pytest.fixture
def llm(engine: Any) -> GistLLM:
    return GistLLM(engine=engine, max_new_tokens=96)


@pytest.fixture
def both(known: Any) -> list[ChatMessage]:
    """A conversation with two known passages."""
    return [ChatMessage(f"{known[0].text}\n\n{known[1].text}\n\nWhere to?")]


def called(llm: GistLLM, response: ChatResponse) -> list[tuple[str, dict[str, Any]]]:
    calls = llm.get_tool_calls_from_response(response, error_on_no_tool_call=False)
    assert len({call.tool_id for call in calls}) == len(calls)
    return [(call.tool_name, call.tool_kwargs) for call in calls]


def is_call(call: tuple[str, dict[str, Any]]) -> bool:
    name, arguments = call
    if name == "go":
        return arguments in ({"side": "left"}, {"side": "right"})
    return name == "stop" and arguments in ({"now": True}, {"now": False})


async def test_a_required_tool_is_called_with_arguments_that_fit(llm: GistLLM) -> None:
    options: dict[str, Any] = {"user_msg": "Where to?", "tool_required": True}
    whole = llm.chat_with_tools(TOOLS, **options)
    [call] = called(llm, whole)
    assert is_call(call)
    assert called(llm, await llm.achat_with_tools(TOOLS, **options)) == [call]
    *_, last = llm.stream_chat_with_tools(TOOLS, **options)
    assert called(llm, last) == [call]
    *_, last = [r async for r in await llm.astream_chat_with_tools(TOOLS, **options)]
    assert called(llm, last) == [call]
    assert last.raw is not None
    assert last.raw["usage"] == whole.raw["usage"]


@pytest.mark.parametrize(
    "choice", ["stop", {"type": "function", "function": {"name": "stop"}}, {"name": "stop"}]
)
def test_a_tool_may_be_chosen_by_name(llm: GistLLM, choice: Any) -> None:
    response = llm.chat_with_tools(TOOLS, user_msg="Where to?", tool_choice=choice)
    [(name, _)] = called(llm, response)
    assert name == "stop"


def test_a_tool_that_is_not_there_cannot_be_chosen(llm: GistLLM) -> None:
    with pytest.raises(BadInput, match="'fly'"):
        llm.chat_with_tools(TOOLS, user_msg="Where to?", tool_choice="fly")


def test_no_choice_leaves_text(llm: GistLLM, prompts: Any) -> None:
    response = llm.chat_with_tools(TOOLS, user_msg="Where to?", tool_choice="none")
    assert called(llm, response) == []
    assert "Go to a side." not in prompts.texts[0]
    with pytest.raises(ValueError, match="calls no tool"):
        llm.get_tool_calls_from_response(response)


def test_tools_are_offered_beside_gists(llm: GistLLM, prompts: Any, both: Any) -> None:
    response = llm.chat_with_tools(TOOLS, chat_history=both, tool_required=True)
    assert [len(found) for found in prompts.gists] == [2]
    assert "Go to a side." in prompts.texts[0]
    assert response.raw["gist"]["hits"] == 2


def test_calls_and_their_results_are_read_back(llm: GistLLM, prompts: Any, known: Any) -> None:
    call = ToolCallBlock(tool_call_id="1", tool_name="go", tool_kwargs={"side": "left"})
    history = [
        ChatMessage("Where to?"),
        ChatMessage(role="assistant", blocks=[TextBlock(text="Let me see."), call]),
        ChatMessage(known[0].text, role="tool", additional_kwargs={"tool_call_id": "1"}),
    ]
    llm.chat_with_tools(TOOLS, chat_history=history)
    assert prompts.gists == [[known[0].id]]
    assert llm.engine.tool_format.write("go", {"side": "left"}) in prompts.texts[0]


# ---- structured output


def test_structured_prediction_fits_its_class(llm: GistLLM, prompts: Any, known: Any) -> None:
    prompt = PromptTemplate("{text}\n\nWhich side?")
    assert isinstance(llm.structured_predict(Step, prompt, text=known[0].text), Step)
    assert prompts.gists == [[known[0].id]]


async def test_structured_prediction_may_be_awaited_and_streamed(llm: GistLLM) -> None:
    prompt = PromptTemplate("Which side?")
    whole = await llm.astructured_predict(Step, prompt)
    first, *_, last = llm.stream_structured_predict(Step, prompt)
    assert (first.side, last) == (None, whole)
    *_, last = [step async for step in await llm.astream_structured_predict(Step, prompt)]
    assert last == whole


def test_structured_llm_answers_chats(llm: GistLLM) -> None:
    response = llm.as_structured_llm(Step).chat([ChatMessage("Which side?")])
    assert isinstance(response.raw, Step)


def test_query_engine_gives_structured_answers_from_gists(
    llm: GistLLM, prompts: Any, known: Any
) -> None:
    from llama_index.core import SummaryIndex
    from llama_index.core.schema import TextNode

    index = SummaryIndex([TextNode(text=p.text) for p in known[:2]])
    answer = index.as_query_engine(llm=llm.as_structured_llm(Step)).query("Which side?")
    assert isinstance(answer.response, Step)
    assert prompts.gists == [[p.id for p in known[:2]]]


# ---- agents


async def test_function_agent_calls_tools(llm: GistLLM) -> None:
    agent = FunctionAgent(tools=TOOLS, llm=llm, initial_tool_choice="go")
    result = await agent.run("Where to?", max_iterations=2, early_stopping_method="generate")
    assert [call.tool_name for call in result.tool_calls][:1] == ["go"]


def test_predict_and_call_runs_the_tool(llm: GistLLM) -> None:
    response = llm.predict_and_call(TOOLS, user_msg="Where to?", tool_required=True)
    assert response.response in ("went left", "went right", "stopped")


# ---- reading answers


def test_text_and_calls_are_told_apart_while_they_come(llm: GistLLM) -> None:
    form = llm.engine.tool_format
    written = "Well. " + form.write("go", {"side": "left"}) + form.write("stop", {"now": True})
    reader, deltas = AnswerReader(form), []
    for letter in written:
        deltas.append(reader.push(letter))
    deltas.append(reader.close())
    message = reader.message()
    assert "".join(deltas) == message.content
    assert message.content.strip() == "Well."
    assert [b.tool_name for b in message.blocks if isinstance(b, ToolCallBlock)] == ["go", "stop"]
    assert called(llm, ChatResponse(message=message)) == [
        ("go", {"side": "left"}),
        ("stop", {"now": True}),
    ]


def test_a_call_that_was_cut_short_gives_what_can_be_read(llm: GistLLM) -> None:
    form = llm.engine.tool_format
    reader = AnswerReader(form)
    reader.push(form.write("go", {"side": "left", "why": "because"}).partition("because")[0])
    reader.close()
    [(name, arguments)] = called(llm, ChatResponse(message=reader.message()))
    assert (name, arguments["side"]) == ("go", "left")
