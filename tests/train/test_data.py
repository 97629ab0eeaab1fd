"""What a training step sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gist_rag.errors import BadInput
from gist_rag.prompt import rag_messages
from gist_rag.questions import load_questions
from gist_rag.train.config import TrainConfig
from gist_rag.train.data import UNANSWERABLE, Example, Examples

QUESTIONS = Path("gist_rag/data/sqlite_questions.jsonl").resolve()
GOLD = {q.text: q.gold[0] for q in load_questions(QUESTIONS)}


def examples(**settings: Any) -> Examples:
    given = {"method": "gisting", "data": [QUESTIONS], "out": "unused", **settings}
    return Examples(TrainConfig.read(given), lambda text: len(text.split()))


def test_a_step_is_the_same_whenever_it_is_drawn() -> None:
    one, other = examples(passages=(1, 4)), examples(passages=(1, 4))
    other.batch(3)
    assert one.batch(7) == other.batch(7)
    assert one.batch(7) != one.batch(8)


def test_another_seed_gives_other_batches() -> None:
    assert examples(seed=1).batch(0) != examples(seed=2).batch(0)


def test_the_gold_passage_is_there_among_as_many_as_asked_for() -> None:
    supply, counts = examples(passages=(1, 4), batch_size=4), set()
    for step in range(30):
        batch, _ = supply.batch(step)
        for example in batch:
            assert GOLD[example.question] in example.passages
            assert len(set(example.passages)) == len(example.passages)
        counts |= {len(example.passages) for example in batch}
    assert counts == {1, 2, 3, 4}


def test_the_gold_passage_stands_everywhere() -> None:
    supply = examples(passages=(3, 3), batch_size=8)
    places = {
        e.passages.index(GOLD[e.question]) for step in range(20) for e in supply.batch(step)[0]
    }
    assert places == {0, 1, 2}


def test_one_passage_sometimes_stays_text() -> None:
    supply = examples(passages=(3, 3), text_share=0.5)
    kept = [e for step in range(20) for e in supply.batch(step)[0] if e.as_text]
    assert 20 < len(kept) < 140
    assert all(len(e.gisted) == 2 for e in kept)
    before, pieces = kept[0].pieces(lambda messages: messages[0]["content"])
    assert kept[0].passages[next(iter(kept[0].as_text))] in before + "".join(
        p or "" for p in pieces
    )
    assert pieces.count(None) == 2


def test_a_reader_also_sees_no_passages_and_wrong_ones() -> None:
    supply = examples(method="reader", passages=(2, 2), closed_share=0.3, unanswerable_share=0.3)
    batch = [e for step in range(30) for e in supply.batch(step)[0]]
    assert any(not e.passages for e in batch)
    unanswerable = [e for e in batch if e.answer == UNANSWERABLE]
    assert unanswerable
    assert all(GOLD[e.question] not in e.passages for e in unanswerable)


def test_several_questions_are_asked_of_the_same_passages(tmp_path: Path) -> None:
    passages = [f"Passage {n} says that the answer is {n}." for n in range(6)]
    rows = [
        {
            "id": f"{n}-{k}",
            "question": f"Question {k} about {n}?",
            "answers": [str(n)],
            "passages": [{"text": passages[n], "gold": True}],
        }
        for n in range(6)
        for k in range(3)
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    batch, _ = examples(data=[file], passages=(2, 2), batch_size=8, questions_per_context=4).batch(
        0
    )
    contexts: dict[tuple[str, ...], list[Example]] = {}
    for example in batch:
        contexts.setdefault(example.passages, []).append(example)
    assert len(batch) == 8
    assert [len(asked) for asked in contexts.values()] == [4, 4]
    for held, asked in contexts.items():
        assert len({e.question for e in asked}) == 4
        assert all(any(f"answer is {e.answer}." in text for text in held) for e in asked)


def test_a_prompt_of_text_alone_is_parted_behind_its_passages() -> None:
    """So that all questions of the same passages share what stands before."""
    render = lambda messages: f"<{messages[0]['content']}>"
    for passages in ((), ("one",), ("one", "two")):
        example = Example("Why?", "so", passages, range(len(passages)))
        before, [rest] = example.pieces(render)
        assert before.endswith(passages[-1] if passages else "")
        assert before + rest == render(rag_messages("Why?", passages))


def test_long_passages_are_left_out() -> None:
    supply = examples(max_passage_tokens=150)
    assert 0 < len(supply.questions) < 30
    assert all(len(q.gold[0].split()) <= 150 for q in supply.questions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_passage_tokens": 8}, "8 tokens or fewer"),
        ({"passages": (3, 2)}, "fewest"),
        ({"ratios": [0.5]}, "1 or more"),
        ({"lr": -1}, "lr"),
        ({"stepz": 1}, "stepz"),
        ({"data": ["/nowhere.jsonl"]}, "nowhere"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        examples(**settings)


def test_a_corpus_does_where_no_question_is_asked(tmp_path: Path) -> None:
    rows = [{"id": name, "title": name, "text": f"{name} is a city."} for name in ("Oslo", "Turin")]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(map(json.dumps, rows)))
    alone = {"data": [corpus], "passages": (1, 1)}
    batch, _ = examples(**alone, questions_per_context=0, batch_size=2).batch(0)
    assert {e.passages for e in batch} == {("Oslo is a city.",), ("Turin is a city.",)}
    with pytest.raises(BadInput, match="no question, answers, passages"):
        examples(**alone)


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    for content, message in (
        ("{", "no JSON"),
        ("[1]", "no row|no id"),
        ('{"id": 1}', "no question"),
    ):
        path = tmp_path / "other.jsonl"
        path.write_text(content)
        with pytest.raises(BadInput, match=message):
            examples(data=[path], questions_per_context=0)
