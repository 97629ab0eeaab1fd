"""Constrained answers: whatever the model would like to say, the form is kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from gist_rag.constrain import Constraint
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.sampling import Chooser
from gist_rag.types import Sampling

QUESTION = "What is a WAL file?"
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "up": {"type": "boolean"}},
    "required": ["x", "up"],
    "additionalProperties": False,
}
TEXTS = {
    "type": "object",
    "properties": {"setup": {"type": "string"}, "tags": {"type": "string", "maxLength": 3}},
    "required": ["setup", "tags"],
    "additionalProperties": False,
}


def is_point(text: str) -> bool:
    point = json.loads(text)
    return point.keys() == {"x", "up"} and point["x"] in range(10) and point["up"] in (True, False)


FORMS: dict[str, tuple[Constraint, Any]] = {
    "json": (Constraint.json(POINT), is_point),
    "regex": (
        Constraint.regex(r"[0-9]{4}/[a-f]{2}"),
        lambda t: re.fullmatch(r"[0-9]{4}/[a-f]{2}", t),
    ),
    "choices": (Constraint.choices(["yes", "no", 'say "ü"']), lambda t: t in FORMS_CHOICES),
}
FORMS_CHOICES = ("yes", "no", 'say "ü"')


def ask(engine: GistEngine, constraint: Constraint | None, **settings: Any) -> Any:
    settings = {"max_tokens": 60, **settings}
    return engine.generate(QUESTION, Sampling(constraint=constraint, **settings))


@pytest.mark.parametrize("temperature", [0.0, 2.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("form", FORMS)
def test_a_random_model_keeps_to_the_form(
    tiny_engine: GistEngine, form: str, temperature: float
) -> None:
    constraint, holds = FORMS[form]
    answer = ask(tiny_engine, constraint, temperature=temperature, seed=3)
    assert holds(answer.text)
    assert answer.finish_reason == "stop"


def test_each_row_of_a_batch_has_a_form_of_its_own(tiny_engine: GistEngine) -> None:
    samplings = [Sampling(max_tokens=60, constraint=c) for c, _ in FORMS.values()]
    samplings.append(Sampling(max_tokens=9))
    *formed, free = tiny_engine.batch([QUESTION] * 4, samplings)
    for answer, (_, holds) in zip(formed, FORMS.values(), strict=True):
        assert holds(answer.text)
    assert free.text == ask(tiny_engine, None, max_tokens=9).text


def test_an_answer_may_end_only_where_the_grammar_is_satisfied(tiny_engine: GistEngine) -> None:
    follower = tiny_engine.backbone.grammars.follow(Constraint.regex("ab+"))
    stop_ids = tiny_engine.backbone.stop_ids
    vocabulary = len(tiny_engine.backbone.tokenizer)
    ends = []
    for token in tiny_engine.backbone.tokenize("abb").tolist():
        ends.append(any(follower.allowed(vocabulary)[i] for i in stop_ids))
        follower.take(token)
    assert ends[0] is False
    assert follower.satisfied
    assert any(follower.allowed(vocabulary)[i] for i in stop_ids)


def test_an_answer_without_room_for_its_form_is_cut_off(tiny_engine: GistEngine) -> None:
    answer = ask(tiny_engine, Constraint.json(POINT), max_tokens=3)
    assert answer.finish_reason == "length"
    assert answer.num_tokens == 3


def test_open_strings_share_what_room_there_is(tiny_engine: GistEngine) -> None:
    constraint = Constraint.json(TEXTS, max_chars=10)
    text = json.loads(ask(tiny_engine, constraint, max_tokens=80).text)
    assert len(text["setup"]) <= 10
    assert len(text["tags"]) <= 3


def test_no_keys_are_made_up(tiny_engine: GistEngine) -> None:
    inner = {"type": "object", "properties": {"properties": {"type": "integer"}}}
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/inner"}},
        "required": ["a"],
        "$defs": {"inner": inner},
    }
    for seed in range(4):
        text = ask(tiny_engine, Constraint.json(schema), temperature=2.0, seed=seed).text
        assert json.loads(text).keys() == {"a"}
        assert json.loads(text)["a"].keys() <= {"properties"}


def test_letters_are_not_escaped(tiny_engine: GistEngine) -> None:
    grammar = tiny_engine.backbone.grammars
    follower = grammar.follow(Constraint.json({"enum": ["你好"]}))
    for token in tiny_engine.backbone.tokenize('"你好"').tolist():
        follower.take(token)
    assert follower.satisfied


@pytest.mark.parametrize(
    "constraint",
    [Constraint.regex("(["), Constraint.json({"type": "nothing"}), Constraint("start: missing")],
    ids=["regex", "schema", "grammar"],
)
def test_what_is_no_grammar_is_refused(tiny_engine: GistEngine, constraint: Constraint) -> None:
    with pytest.raises(BadInput, match="cannot be constrained"):
        ask(tiny_engine, constraint)


def test_no_choices_are_refused() -> None:
    with pytest.raises(BadInput, match="no choices"):
        Constraint.choices([])


def test_a_grammar_is_compiled_once(tiny_engine: GistEngine) -> None:
    grammars = tiny_engine.backbone.grammars
    for _ in range(3):
        grammars.follow(Constraint.choices(["compiled", "once"]))
    assert list(grammars._compiled).count(Constraint.choices(["compiled", "once"])) == 1


@pytest.mark.slow
def test_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['llguidance'] = sys.modules['llguidance.hf'] = None\n"
        "from gist_rag.constrain import Grammars\nGrammars(None, [])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "MissingExtra: " in ended.stderr
    assert "pip install 'gist-rag[tools]'" in ended.stderr


def test_what_has_no_choice_is_read_in_one_pass(
    tiny_engine: GistEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, sizes = tiny_engine.backbone, []
    read = backbone._hidden

    def counted(step: Any) -> Any:
        sizes.append(step.ids.shape[1])
        return read(step)

    monkeypatch.setattr(backbone, "_hidden", counted)
    fixed = "This sentence is given: "
    tiny_engine.check_model()
    sizes.clear()
    answer = ask(tiny_engine, Constraint.regex(fixed + "[ab][cd]{1,2}"))
    assert answer.text.startswith(fixed)
    assert max(sizes[1:]) > 6
    assert len(sizes) < answer.num_tokens / 2


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_reading_together_changes_nothing(
    tiny_engine: GistEngine, passages: Any, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"{p.text}\n\n{QUESTION}\n" for p in passages[:2]]
    constraint = Constraint.regex("This sentence is given: (.|\n)*")
    samplings = [Sampling(max_tokens=40, constraint=constraint), Sampling(max_tokens=30)]

    def ask_all() -> list[str]:
        alone = tiny_engine.generate(prompts[0], samplings[0], gist_mode=mode)
        batch = tiny_engine.batch(prompts, samplings, gist_mode=mode)
        return [alone.text, *(answer.text for answer in batch)]

    together = ask_all()
    monkeypatch.setattr(Chooser, "knows_next", False)
    assert ask_all() == together
    assert together[0] == together[1]
