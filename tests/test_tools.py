"""Tool calls as text: what is offered, what may be written, what is read out of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gist_rag.backbone import Backbone
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.tools import (
    BARE,
    TAGGED,
    CallReader,
    Piece,
    ToolFormat,
    tool_format,
    with_instruction,
)
from gist_rag.types import Message, Sampling

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather at a place",
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
            "required": ["day"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time"}}
MESSAGES: list[Message] = [{"role": "user", "content": "What is the weather?"}]
FORMATS = pytest.mark.parametrize("form", [TAGGED, BARE], ids=["tagged", "bare"])


def read(text: str, form: ToolFormat = TAGGED, step: int = 10**6) -> tuple[str, dict[int, Any]]:
    """Text and calls of an answer that comes in steps of so many letters."""
    reader, calls, plain = CallReader(form), {}, ""
    pieces: list[Piece] = []
    for at in range(0, len(text), step):
        pieces += reader.push(text[at : at + step])
    for piece in [*pieces, *reader.close()]:
        plain += piece.text
        if piece.call is not None:
            name, arguments = calls.get(piece.call, (piece.name, ""))
            calls[piece.call] = (name, arguments + piece.arguments)
    return plain, calls


def answer(engine: GistEngine, form: ToolFormat, tools: list[Any], **options: Any) -> str:
    constraint = form.constrain(tools, **options)
    sampling = Sampling(max_tokens=120, constraint=constraint, temperature=1.5, seed=5)
    return engine.generate(MESSAGES, sampling, tools=tools).text


# ---- reading


@FORMATS
def test_a_call_is_read_as_it_was_written(form: ToolFormat) -> None:
    arguments = {"place": 'San "Fran" {[', "days": [1, {"2": None}]}
    _, calls = read(form.write("weather", arguments), form)
    assert [(name, json.loads(written)) for name, written in calls.values()] == [
        ("weather", arguments)
    ]


@given(st.integers(1, 9), st.text(max_size=20), st.dictionaries(st.text(), st.text(), max_size=3))
def test_calls_do_not_depend_on_how_the_answer_is_cut(
    step: int, text: str, arguments: dict[str, str]
) -> None:
    whole = f"{text}{TAGGED.write('a', arguments)}\n{TAGGED.write('b', {})}"
    plain, calls = read(whole, step=step)
    assert calls == read(whole)[1]
    assert plain.split() == read(whole)[0].split()


def test_arguments_come_while_they_are_written() -> None:
    reader = CallReader(TAGGED)
    assert reader.push("Let me see. <tool") == [Piece("Let me see.")]
    assert reader.push('_call>\n{"name": "weather", "arguments": {"pla') == [
        Piece(call=0, name="weather"),
        Piece(call=0, arguments='{"pla'),
    ]
    assert reader.push('ce": "x"}}\n</tool_call>') == [Piece(call=0, arguments='ce": "x"}')]
    assert reader.close() == []


def test_text_that_only_looks_like_a_call_stays_text() -> None:
    for text in ("a < b, <tool> and <tool_cal", "  spaces stay  ", '{"no": "call"}'):
        assert read(text, step=1) == (text, {})
        assert read(text, BARE, step=1) == (text, {})


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ('{"arguments": {"x": 1}, "name": "late"}', {0: ("late", '{"x": 1}')}),
        ('[{"name": "a", "arguments": {}}, {"name": "b"}]', {0: ("a", "{}"), 1: ("b", "{}")}),
        ("no json", {0: (None, "no json")}),
        ('{"name": 3, "arguments": {}}', {0: (None, '{"name": 3, "arguments": {}}')}),
        ('{"name": "cut", "arguments": {"x": 1', {0: ("cut", '{"x": 1')}),
    ],
    ids=["name last", "list", "broken", "no name", "cut off"],
)
def test_other_ways_to_write_a_call(body: str, calls: Any) -> None:
    end = "" if body.endswith("1") else "</tool_call>"
    assert read(f"<tool_call>{body}{end}") == ("", calls)


# ---- writing


@FORMATS
def test_a_forced_call_is_one_of_the_tools(tiny_engine: GistEngine, form: ToolFormat) -> None:
    text, calls = read(answer(tiny_engine, form, [WEATHER, CLOCK], choice="required"), form)
    assert text == ""
    [(name, written)] = calls.values()
    assert (name, json.loads(written)) in [
        ("clock", {}),
        *(("weather", {"day": d + 1}) for d in range(7)),
    ]


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_a_named_tool_is_the_one_called(tiny_engine: GistEngine, name: str) -> None:
    text = answer(tiny_engine, TAGGED, [WEATHER, CLOCK], choice={"name": name})
    assert [call[0] for call in read(text)[1].values()] == [name]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(BadInput, match="'sun', which is no bound tool"):
        TAGGED.constrain([WEATHER], {"name": "sun"})


@FORMATS
def test_left_free_a_model_may_answer_in_words_or_call(
    tiny_engine: GistEngine, form: ToolFormat
) -> None:
    follow = tiny_engine.backbone.grammars.follow
    constraint = form.constrain([CLOCK])
    for text in ("In words.", form.write("clock", {})):
        follower = follow(constraint)
        for token in tiny_engine.backbone.tokenize(text).tolist():
            follower.take(token)
        assert follower.satisfied
    follower = follow(constraint)
    *known, unknown = tiny_engine.backbone.tokenize(TAGGED.opening + '\n{"name": "s').tolist()
    if form is TAGGED:
        for token in known:
            follower.take(token)
        with pytest.raises(BadInput, match="gave up"):
            follower.take(unknown)


@pytest.mark.parametrize("parallel", [True, False])
def test_several_calls_only_where_allowed(tiny_engine: GistEngine, parallel: bool) -> None:
    follower = tiny_engine.backbone.grammars.follow(
        TAGGED.constrain([CLOCK], "required", parallel=parallel)
    )
    twice = "\n".join([TAGGED.write("clock", {})] * 2)
    allowed = 0
    for token in tiny_engine.backbone.tokenize(twice).tolist():
        if not follower.allowed(600)[token]:
            break
        follower.take(token)
        allowed += 1
    assert (allowed == len(tiny_engine.backbone.tokenize(twice))) is parallel


def test_words_can_be_kept_to_a_schema_too(tiny_engine: GistEngine) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    text, calls = read(answer(tiny_engine, TAGGED, [CLOCK], schema=schema))
    assert calls or "n" in json.loads(text)


# ---- offering


def test_a_template_without_tools_has_them_described(tiny_engine: GistEngine) -> None:
    assert not tiny_engine.backbone.shows_tools
    [segment] = tiny_engine.segments(MESSAGES, tools=[WEATHER])
    assert segment.text.startswith("<|im_start|>system\n# Tools")
    assert '"name": "weather"' in segment.text


def test_a_template_with_tools_shows_them_itself(make_model: Any, tokenizer: Any) -> None:
    template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + (
        tokenizer.chat_template
    )
    backbone = Backbone(make_model("llama"), tokenizer, "tiny")
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = template
        assert backbone.shows_tools
        assert backbone.render(MESSAGES, [WEATHER]).startswith("[weather]")
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (None, TAGGED),
        ("{{ messages }}", TAGGED),
        ("within <tool_call></tool_call>", TAGGED),
        ('{"name": function name, "parameters": dictionary}', BARE),
    ],
    ids=["none", "plain", "qwen", "llama"],
)
def test_the_format_is_the_templates(template: str | None, form: ToolFormat) -> None:
    assert tool_format(template) is form


def test_an_instruction_joins_the_system_message() -> None:
    system: Message = {"role": "system", "content": "Be brief."}
    assert with_instruction([system, *MESSAGES], "Use tools.") == [
        {"role": "system", "content": "Be brief.\n\nUse tools."},
        *MESSAGES,
    ]
    assert with_instruction(MESSAGES, "Use tools.")[0]["role"] == "system"
