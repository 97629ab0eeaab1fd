"""Which passages matter: only those are read, or read as text where gists leave a doubt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import arrange
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput
from gist_rag.focus import ROWS, Expand, Focus, log_likelihoods, make_focus
from gist_rag.lora import LoRAConfig
from gist_rag.reader import Reader
from gist_rag.types import Answer, Passage, Sampling

QUESTION = "\n\nWhat is SQLite?"
ALWAYS, NEVER = 0.0, 1e9
Engines = Callable[..., GistEngine]


def prompt(passages: list[Passage], between: str = "\n\n") -> str:
    return "Documents:\n" + between.join(p.text for p in passages) + QUESTION


def ask(engine: GistEngine, text: str, **kwargs: object) -> Answer:
    return engine.generate(text, Sampling(max_tokens=4), **kwargs)  # type: ignore[arg-type]


def test_likelihoods_are_those_of_plain_text(any_backbone: Backbone) -> None:
    """Uncompressed gists are their text, so this is what transformers says of it."""
    backbone = any_backbone
    torch.manual_seed(0)
    ids = [torch.randint(5, 200, (n,)) for n in (3, *(4 + i % 5 for i in range(ROWS + 2)))]
    head, passages, question = ids[0], ids[1:], torch.randint(5, 200, (6,))
    states = make_compressor("full", backbone).compress(passages)
    arranged = [arrange([state, question], len(head), "sequence") for state in states]
    found = log_likelihoods(
        backbone,
        [backbone.prefix(head)] * len(states),
        [placed for placed, _ in arranged],
        [text for _, text in arranged],
        [99, *[4] * (len(states) - 1)],
    )
    for place, count in ((0, 5), (1, 4), (ROWS + 1, 4)):
        # a passage is encoded alone: it does not see the head
        whole = torch.cat((head, passages[place], question))
        size, first = len(whole), len(head)
        mask = torch.ones(size, size, dtype=torch.bool).tril()
        mask[first : first + len(passages[place]), :first] = False
        with torch.no_grad():
            logs = backbone.model(
                whole[None],
                attention_mask=torch.zeros(size, size).masked_fill(~mask, -torch.inf)[None, None],
            ).logits[0]
        logs = logs.log_softmax(-1)[-1 - count : -1]
        expected = logs.gather(-1, question[-count:, None]).sum()
        assert float(found[place]) == pytest.approx(float(expected), abs=1e-3)


def test_what_an_adapter_reads_is_not_judged(backbone: Backbone) -> None:
    """A reader has not learnt to foretell the opening that it begins with."""
    reader = Reader(backbone, LoRAConfig(rank=2))
    for weight in reader.parameters():
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    question, opening = map(backbone.tokenize, ("What is SQLite?", backbone.opening))
    texts = [Local.after(torch.cat((question, opening)), 0, 0), Local.after(question, 0, 0)]
    context = Context([backbone.prefix(question[:0])] * 2, None)
    counts = [len(text.ids) for text in texts]
    adapted = backbone.open(context, texts, reader, counts=counts)
    assert adapted.likelihoods is not None
    assert float(adapted.likelihoods[0]) == pytest.approx(float(adapted.likelihoods[1]), abs=1e-3)


@pytest.mark.parametrize(
    ("focus", "chosen"),
    [
        (Focus(1), [3]),
        (Focus(3), [0, 2, 3]),
        (Focus(9), [0, 1, 2, 3]),
        (Focus(9, margin=2.0), [0, 3]),
        (Focus(1, margin=0.0), [3]),
    ],
    ids=str,
)
def test_focus_chooses_the_likeliest(focus: Focus, chosen: list[int]) -> None:
    assert focus.chosen(torch.tensor([-3.0, -9.0, -4.5, -2.0])) == chosen


def test_readings_apart_weigh_by_likelihood_and_all_together_by_share() -> None:
    likelihoods = torch.tensor([-3.0, -9.0, -4.5, -2.0])
    focus = Focus(2, apart=True, temperature=2.0, together=0.25)
    readings, weights = focus.readings(likelihoods)
    assert readings == [[0], [3], [0, 1, 2, 3]]
    expected = torch.cat((torch.tensor([-1.5, -1.0]).softmax(0) * 0.75, torch.tensor([0.25])))
    torch.testing.assert_close(weights.exp(), expected)
    assert all(reading in focus.candidates(4) for reading in readings)
    alone = replace(focus, together=0.0)
    assert alone.readings(likelihoods)[0] == [[0], [3]]
    torch.testing.assert_close(alone.readings(likelihoods)[1].exp(), expected[:2] / 0.75)
    assert focus.readings(likelihoods[:1])[0] == focus.candidates(1) == [[0]]
    assert Focus(2).readings(likelihoods)[0] == [[0, 3]]


@pytest.mark.parametrize(
    "given", [{"passages": 0}, {"margin": -1.0}, {"together": 1.0}, {"together": -0.1}], ids=str
)
def test_focus_refuses_what_cannot_be(given: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=r"1 or more|from 0 to less than 1"):
        Focus(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [(-1.0, 1), (float("nan"), 1), (0.5, 0), (0.5, -1)], ids=str)
def test_expand_refuses_what_cannot_be(given: tuple[float, int]) -> None:
    with pytest.raises(BadInput, match="1 or more, and doubt 0 or more"):
        Expand(*given)


def test_a_margin_counts_however_few_passages_there_are(
    make_engine: Engines, passages: list[Passage]
) -> None:
    engine = make_engine(settings={"ratio": 4}, focus=Focus(3, margin=0.0))
    engine.precompute(passages[:3])
    stats = ask(engine, prompt(passages[:3])).stats
    assert (stats.hits, stats.left_out) == (1, 2)


def test_text_that_does_not_fit_is_not_read(
    make_engine: Engines, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gists do, and have been read."""
    options = {"settings": {"ratio": 4}, "positions": "parallel"}
    engine = make_engine(**options, expand=Expand(ALWAYS, 3))
    engine.precompute(passages[:3])
    sizes = [len(engine.backbone.tokenize(p.text)) for p in passages[:3]]
    monkeypatch.setattr(engine.backbone, "max_positions", max(sizes) + 40)
    answer = ask(engine, prompt(passages[:3]))
    assert (answer.stats.hits, answer.stats.expanded) == (3, 0)
    assert answer.text == ask(make_engine(**options), prompt(passages[:3])).text


def test_a_focused_answer_is_that_of_a_prompt_with_the_chosen_passage(
    make_engine: Engines, passages: list[Passage]
) -> None:
    engine = make_engine(settings={"ratio": 4}, focus=Focus(1))
    engine.precompute(passages[:3])
    focused = ask(engine, prompt(passages[:3]))
    assert (focused.stats.hits, focused.stats.left_out) == (1, 2)
    [chosen] = focused.passages
    alone = ask(engine, prompt([chosen]))
    assert (alone.text, alone.stats.left_out) == (focused.text, 0)
    assert {p.content for p in passages[:3]} > {chosen.content}


def test_as_many_as_there_are_are_all_read(make_engine: Engines, passages: list[Passage]) -> None:
    engine = make_engine(settings={"ratio": 4}, focus=Focus(3))
    engine.precompute(passages[:3])
    answer = ask(engine, prompt(passages[:3]))
    assert (answer.stats.hits, answer.stats.left_out) == (3, 0)
    assert [p.content for p in answer.passages] == [p.content for p in passages[:3]]


def test_what_stands_between_passages_stays(make_engine: Engines, passages: list[Passage]) -> None:
    """A label is text, which belongs to no passage; the first text stays the prefix."""
    engine = make_engine(settings={"ratio": 4}, focus=Focus(1))
    engine.precompute(passages[:3])
    answer = ask(engine, prompt(passages[:3], "\n\nNext document:\n"))
    plain = ask(engine, prompt(passages[:3], "\n\nNext document:\n"), gist_mode="off")
    assert (answer.stats.hits, answer.stats.left_out) == (1, 2)
    labels = 2 * len(engine.backbone.tokenize("\n\nNext document:\n"))
    question = len(engine.backbone.tokenize(QUESTION))
    assert answer.stats.text_tokens == pytest.approx(labels + question, abs=2)
    assert answer.stats.cached_tokens == len(engine.backbone.tokenize("Documents:\n"))
    assert plain.stats.left_out == 0


@pytest.mark.parametrize(
    "options",
    [
        {"focus": Focus(1)},
        {"focus": Focus(1, apart=True, together=0)},
        {"focus": Focus(1, apart=True)},
        {"expand": Expand(ALWAYS)},
        {"judge": "likelihood"},
        {"judge": "likelihood", "focus": Focus(1)},
        {"judge": "likelihood", "expand": Expand(ALWAYS)},
        {"focus": Focus(2, apart=True), "expand": Expand(ALWAYS)},
    ],
    ids=str,
)
def test_each_prompt_of_a_batch_for_itself(
    make_engine: Engines, passages: list[Passage], options: dict[str, object]
) -> None:
    """Of different sizes; the last one has nothing to choose from."""
    engine = make_engine(settings={"ratio": 4}, **options)
    engine.precompute(passages[:4])
    prompts = [prompt(passages[:2]), prompt(passages[1:4]), QUESTION]
    together = engine.batch(prompts, Sampling(max_tokens=4))
    alone = [engine.batch([p], Sampling(max_tokens=4))[0] for p in prompts]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [[p.content for p in a.passages] for a in together] == [
        [p.content for p in a.passages] for a in alone
    ]
    stats = [a.stats for a in together]
    assert [s.hits + s.left_out + s.expanded for s in stats] == [2, 3, 0]
    assert [s.expanded for s in stats] == ([1, 1, 0] if "expand" in options else [0, 0, 0])


def test_a_sure_answer_is_read_from_gists(make_engine: Engines, passages: list[Passage]) -> None:
    engine = make_engine(settings={"ratio": 4}, expand=Expand(NEVER))
    engine.precompute(passages[:3])
    answer = ask(engine, prompt(passages[:3]))
    assert (answer.stats.hits, answer.stats.expanded) == (3, 0)


@pytest.mark.parametrize("many", [1, 2, 9])
def test_a_doubtful_one_reads_what_matters_as_text(
    make_engine: Engines, passages: list[Passage], many: int
) -> None:
    engine = make_engine(settings={"ratio": 4}, expand=Expand(ALWAYS, many))
    engine.precompute(passages[:3])
    answer = ask(engine, prompt(passages[:3]))
    assert answer.stats.expanded == min(many, 3)
    assert answer.stats.hits == 3 - min(many, 3)
    if many > 2:  # nothing is left as a gist
        assert answer.text == ask(engine, prompt(passages[:3]), gist_mode="off").text


def test_focus_first_and_then_expand(make_engine: Engines, passages: list[Passage]) -> None:
    engine = make_engine(settings={"ratio": 4}, focus=Focus(2), expand=Expand(ALWAYS))
    engine.precompute(passages[:3])
    stats = ask(engine, prompt(passages[:3])).stats
    assert (stats.hits, stats.left_out, stats.expanded) == (1, 1, 1)


def test_passages_apart_answer_together(make_engine: Engines, passages: list[Passage]) -> None:
    """The best of them, and one alone is itself."""
    engine = make_engine(settings={"ratio": 4}, focus=Focus(2, apart=True, together=0))
    engine.precompute(passages[:3])
    one, other = (ask(engine, prompt(p)) for p in (passages[:3], passages[2::-1]))
    assert (one.stats.hits, one.stats.left_out) == (2, 1)
    assert one.text == other.text
    assert {p.content for p in one.passages} == {p.content for p in other.passages}
    alone = ask(engine, prompt(passages[:1]))
    assert (alone.stats.hits, alone.stats.left_out) == (1, 0)


@pytest.mark.parametrize("together", [0.0, 0.2, 1 - 1e-6])
def test_the_order_of_passages_apart_does_not_matter(
    make_engine: Engines, passages: list[Passage], together: float
) -> None:
    """Nor does it where all of them together answer too: none stands before another."""
    focus = Focus(2, apart=True, together=together)
    engine = make_engine(settings={"ratio": 4}, focus=focus)
    engine.precompute(passages[:4])
    logits = []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        segments, fetched = engine._fetch(
            [engine.segments(prompt([passages[i] for i in order]))], ["auto"]
        )
        opened = engine._opener.open(segments, fetched.states, [Sampling()]).opened
        logits.append(opened.mixture(opened.logits[:, -1])[0])
    assert torch.allclose(logits[0], logits[1], atol=1e-4)


def test_all_together_answer_with_those_apart(
    make_engine: Engines, passages: list[Passage]
) -> None:
    """With nearly all of the weight they say what they say by themselves; all passages count as
    read, each once."""
    texts = {}
    for share in (0.0, 1e-6, 0.5, 1 - 1e-6):
        engine = make_engine(settings={"ratio": 4}, focus=Focus(1, apart=True, together=share))
        engine.precompute(passages[:3])
        answer = ask(engine, prompt(passages[:3]))
        texts[share] = answer.text
        if share:
            assert (answer.stats.hits, answer.stats.left_out) == (3, 0)
            assert [p.content for p in answer.passages] == [p.content for p in passages[:3]]
    plain = make_engine(settings={"ratio": 4}, positions="parallel")
    plain.precompute(passages[:3])
    assert texts[1 - 1e-6] == ask(plain, prompt(passages[:3])).text
    assert texts[1e-6] == texts[0.0]


def test_doubt_has_the_best_of_those_apart_as_text(
    make_engine: Engines, passages: list[Passage]
) -> None:
    """One alone is then that passage as text, and nothing else is read."""
    focus = Focus(1, apart=True, together=0)
    engine = make_engine(settings={"ratio": 4}, focus=focus, expand=Expand(ALWAYS))
    engine.precompute(passages[:3])
    segments, fetched = engine._fetch([engine.segments(prompt(passages[:3]))], ["auto"])
    opening = engine._opener.open(segments, fetched.states, [Sampling()])
    [likelihoods] = engine._opener._judge(segments, fetched.states)
    plain = engine.backbone.tokenize(prompt([passages[int(likelihoods.argmax())]]))
    with torch.no_grad():
        logits = engine.backbone.model(plain[None]).logits[0, -1]
    assert torch.allclose(opening.opened.logits[0, -1], logits, atol=1e-4)
    stats = ask(engine, prompt(passages[:3])).stats
    assert (stats.hits, stats.left_out, stats.expanded, stats.gist_slots) == (0, 2, 1, 0)


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
def test_a_passage_that_stands_twice_counts_twice(
    make_engine: Engines, passages: list[Passage], apart: bool
) -> None:
    focus = Focus(3, apart=True) if apart else None
    engine = make_engine(settings={"ratio": 4}, focus=focus)
    engine.precompute(passages[:2])
    answer = ask(engine, prompt([passages[0], passages[1], passages[0]]))
    assert (answer.stats.hits, answer.stats.left_out) == (3, 0)
    assert [p.content for p in answer.passages] == [passages[i].content for i in (0, 1, 0)]


def test_those_apart_are_judged_once(
    make_engine: Engines, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then only those that matter are read again, the best one as text where it stands alone; the
    reading of all has it as a gist, and it counts as text."""
    engine = make_engine(settings={"ratio": 4}, focus=Focus(2, apart=True), expand=Expand(ALWAYS))
    engine.precompute(passages[:4])
    opened: list[tuple[list[int], list[int]]] = []

    def spy(context: Context, texts: list[Local], *args: object, **kwargs: object) -> object:
        opened.append(([int(t.seen[-1]) for t in texts], list(kwargs["counts"] or ())))  # type: ignore[call-overload]
        return open_(context, texts, *args, **kwargs)  # type: ignore[arg-type]

    open_ = engine.backbone.open
    monkeypatch.setattr(engine.backbone, "open", spy)
    answer = ask(engine, prompt(passages[:4]))
    [(first, judged), (then, again)] = opened
    assert first == [1, 1, 1, 1, 4]
    assert all(judged)
    assert sorted(then) == [0, 1, 4]
    assert not any(again)
    assert (answer.stats.hits, answer.stats.expanded, answer.stats.left_out) == (3, 1, 0)
    assert len(answer.passages) == 3


def test_one_passage_apart_is_one_passage(make_engine: Engines, passages: list[Passage]) -> None:
    apart = make_engine(settings={"ratio": 4}, focus=Focus(1, apart=True, together=0))
    together = make_engine(settings={"ratio": 4}, focus=Focus(1))
    for engine in (apart, together):
        engine.precompute(passages[:3])
    assert ask(apart, prompt(passages[:3])).text == ask(together, prompt(passages[:3])).text


def test_together_or_apart_but_not_both() -> None:
    assert make_focus() is None
    assert make_focus(2) == Focus(2) == make_focus(Focus(2))
    assert make_focus(apart=3) == Focus(3, apart=True)
    with pytest.raises(BadInput, match="give one of them"):
        make_focus(2, 3)
