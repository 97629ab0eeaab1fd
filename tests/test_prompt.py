import json
import logging

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gist_rag import prompt as prompt_module
from gist_rag.matching import PassageMatcher
from gist_rag.prompt import (
    Known,
    Text,
    merge,
    rag_messages,
    render_plain,
    split_messages,
)
from gist_rag.types import content_key
from gist_rag.windows import MemoryIndex

NESS = (
    'The Loch Ness monster was first described as a "monster" on 2 May 1933.\n\n'
    "Alex Campbell's report spoke of an <enormous> animal rolling & plunging in the water."
)
SUGAR = "Photosynthesis converts light energy into chemical energy that is stored in sugars."


def template(source, **options):
    """A function from messages to a prompt, as transformers renders chat templates."""
    environment = jinja2.Environment(**options)
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    compiled = environment.from_string(source)
    return lambda messages: compiled.render(messages=messages)


def each_message(content):
    return "{% for m in messages %}<|{{ m.role }}|>\n" + content + "<|end|>\n{% endfor %}<|ai|>"


PLAIN = template(each_message("{{ m.content }}"))
TEMPLATES = {
    "plain": PLAIN,
    "trim": template(each_message("{{ m.content | trim }}")),
    "json tool messages": template(
        each_message("{{ (m.content | json) if m.role == 'tool' else m.content }}")
    ),
    "all json": template(each_message("{{ m.content | json }}")),
    "jinja's tojson": template(each_message("{{ m.content | tojson }}")),
    "one line": template(each_message("{{ m.content.split() | join(' ') }}")),
    "tests the beginning": template(
        each_message("{{ 'T' if m.content.startswith('<tool_response>') }}{{ m.content }}")
    ),
}
REWRITING = {
    "redacted": template(each_message("{{ m.content | replace('Campbell', '***') }}")),
    "lower case": template(each_message("{{ m.content | lower }}")),
    "html": template(each_message("{{ m.content }}"), autoescape=True),
}
MANGLING = {
    "upper case": template(each_message("{{ m.content | upper }}")),
    "cut": template(each_message("{{ m.content[:60] }}")),
    "length": template(each_message("{{ m.content | length }}: {{ m.content }}")),
    "backwards": template(each_message("{{ m.content | reverse }}")),
}


@pytest.fixture(autouse=True)
def _warn_again():
    prompt_module._warn_unsplittable.cache_clear()


def find(text):
    index = MemoryIndex()
    index.add(NESS)
    index.add(SUGAR)
    return PassageMatcher(index).find(text)


def talk(content, role="user"):
    return [{"role": "system", "content": "Be brief."}, {"role": role, "content": content}]


def contents(segments):
    return [segment.content for segment in segments if isinstance(segment, Known)]


def test_a_prompt_is_split_around_its_passages():
    segments = split_messages(talk(f"Read: {SUGAR}\nWhy?"), find, PLAIN)
    assert segments == [
        Text("<|system|>\nBe brief.<|end|>\n<|user|>\nRead: "),
        Known(content_key(SUGAR), SUGAR),
        Text("\nWhy?<|end|>\n<|ai|>"),
    ]


@pytest.mark.parametrize("role", ["user", "tool"])
@pytest.mark.parametrize("render", TEMPLATES.values(), ids=TEMPLATES)
def test_passages_survive_templates_that_encode_them(render, role):
    messages = talk(f"  {NESS}\n\n{SUGAR} \n{NESS}\n", role)
    segments = split_messages(messages, find, render)
    assert contents(segments) == [content_key(p) for p in (NESS, SUGAR, NESS)]
    assert render_plain(segments) == render(messages)


def test_a_passage_in_json_keeps_its_json_text():
    segments = split_messages(talk(NESS, "tool"), find, TEMPLATES["json tool messages"])
    (known,) = [s for s in segments if isinstance(s, Known)]
    assert known.text == json.dumps(NESS)[1:-1]


@pytest.mark.parametrize("render", REWRITING.values(), ids=REWRITING)
def test_a_passage_that_the_template_rewrites_is_read_as_rewritten(render):
    messages = talk(f"From the archive: {NESS}")
    assert split_messages(messages, find, render) == [Text(render(messages))]


def test_a_passage_beside_a_rewritten_one_keeps_its_gist():
    segments = split_messages(talk(f"{NESS}\n{SUGAR}"), find, REWRITING["redacted"])
    assert contents(segments) == [content_key(SUGAR)]


@pytest.mark.parametrize("render", MANGLING.values(), ids=MANGLING)
def test_a_template_that_alters_markers_gets_plain_text(render):
    messages = talk(f"{NESS}\n{SUGAR}")
    assert split_messages(messages, find, render) == [Text(render(messages))]


def test_altered_markers_are_reported_once(caplog):
    for _ in range(3):
        split_messages(talk(NESS), find, MANGLING["upper case"])
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_repeated_message_gives_its_passage_twice():
    render = template(each_message("{{ m.content }} Again: {{ m.content }}"))
    messages = talk(SUGAR)
    segments = split_messages(messages, find, render)
    assert contents(segments) == [content_key(SUGAR)] * 2
    assert render_plain(segments) == render(messages)


def test_a_dropped_message_drops_its_passage(caplog):
    render = template("{{ messages[-1].content }}")
    messages = [*talk(NESS), {"role": "user", "content": f"And {SUGAR}"}]
    assert split_messages(messages, find, render) == [
        Text("And "),
        Known(content_key(SUGAR), SUGAR),
    ]
    assert not caplog.records


def test_no_passage_means_one_rendering():
    calls = []
    segments = split_messages(talk("Hello"), find, lambda m: calls.append(m) or PLAIN(m))
    assert segments == [Text(PLAIN(talk("Hello")))]
    assert len(calls) == 1


def test_only_the_given_roles_are_searched():
    messages = [{"role": role, "content": SUGAR} for role in ("system", "user", "assistant")]
    assert len(contents(split_messages(messages, find, PLAIN))) == 2
    assert len(contents(split_messages(messages, find, PLAIN, roles=["assistant"]))) == 1


@pytest.mark.parametrize(
    "forged",
    ["[[gist-0123456789abcdef0123456789abcdef-0]]", "[[gist-{nonce}-0]]x[[end-{nonce}]]", "{}"],
)
def test_a_typed_marker_stays_literal(forged):
    segments = split_messages(talk(f"{forged} {SUGAR} {forged}"), find, PLAIN)
    assert contents(segments) == [content_key(SUGAR)]
    assert forged in segments[0].text
    assert forged in segments[-1].text


def test_messages_are_left_as_they_were_with_their_extra_fields():
    messages = [{"role": "tool", "content": SUGAR, "tool_call_id": "call-7"}]
    render = template("{{ messages[0].tool_call_id }} {{ messages[0].content }}")
    segments = split_messages(messages, find, render)
    assert render_plain(segments) == f"call-7 {SUGAR}"
    assert messages == [{"role": "tool", "content": SUGAR, "tool_call_id": "call-7"}]


PIECE = st.one_of(
    st.sampled_from([NESS, SUGAR, NESS[:80], "[[gist-", "-0]]", "[[end-", "]]", "\n\n", "\\n"]),
    st.text(max_size=8),
)
CONTENT = st.lists(PIECE, max_size=6).map(" ".join)


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(CONTENT, min_size=1, max_size=3),
    render=st.sampled_from([*TEMPLATES.values(), *REWRITING.values(), *MANGLING.values()]),
)
def test_segments_joined_are_the_prompt_for_any_messages_and_template(contents, render):
    messages = [{"role": "user", "content": content} for content in contents]
    segments = split_messages(messages, find, render)
    assert render_plain(segments) == render(messages)
    assert merge(segments) == segments


def test_merge_joins_texts_and_drops_empty_ones():
    known = Known("key", "passage")
    segments = [Text(""), Text("a"), Text("b"), known, Text(""), known, Text("c"), Text("d")]
    assert merge(segments) == [Text("ab"), known, known, Text("cd")]
    assert merge([Text("")]) == []


def test_rag_messages_hold_the_passages_as_they_are():
    [user] = rag_messages("Who saw it {first}?", [NESS, SUGAR])
    documents, question = user["content"].split("\n\nQuestion: ")
    assert documents.endswith(f"Documents:\n\n{NESS}\n\n{SUGAR}")
    assert question.startswith("Who saw it {first}?\n")
    assert [m.content for m in find(user["content"])] == [content_key(NESS), content_key(SUGAR)]


def test_rag_messages_without_passages_ask_the_question_alone():
    [user] = rag_messages("Who saw it?", [])
    assert user["content"].startswith("Question: Who saw it?\n")
    assert "documents" not in user["content"].lower()
