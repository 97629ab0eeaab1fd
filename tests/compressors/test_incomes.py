"""``incomes``: a bank beside attention, without order, which may also say nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gist_rag.attention import MANY, Reading, read_bank
from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, arrange, compose
from gist_rag.compressors import Compressor, make_compressor
from gist_rag.compressors.base import Answers
from gist_rag.compressors.incomes import InComeS
from gist_rag.engine import GistEngine
from gist_rag.errors import BadInput, CorruptEntry
from gist_rag.layout import Layout
from gist_rag.store.codec import from_bytes, pack, to_bytes, unpack
from gist_rag.types import GistState, Passage, Sampling


@pytest.fixture
def method(backbone: Backbone, taught: Callable[[Compressor], Compressor]) -> InComeS:
    made = taught(make_compressor("incomes", backbone, {"ratio": 4.0, "reluctance": 0.0}))
    assert isinstance(made, InComeS)
    torch.nn.init.normal_(made.zero)
    return made


@pytest.fixture
def states(method: InComeS, ids: Tensor) -> list[GistState]:
    with torch.no_grad():
        return method.compress([ids, ids.flip(0), ids.roll(5)])


@torch.no_grad()
def read(backbone: Backbone, states: Sequence[GistState], question: Tensor) -> Tensor:
    placed, text = arrange([*states, question], 0, "parallel")
    context = Context([backbone.prefix(question[:0])], compose([placed], backbone))
    return backbone.read(context, [text])[0]


def test_mask(backbone: Backbone, drawn: Callable[[Layout], str]) -> None:
    """The mask of the docstring: t t g t t g."""
    method = make_compressor("incomes", backbone, {"ratio": 3.0})  # gists in 2 layers of 3
    layout = method.layout(torch.arange(4))
    assert drawn(layout) == "x\nxx\nxxx\nxx.x\nxx.xx\n...xxx"


def test_later_windows_reach_no_gist(method: InComeS, unchanged: Callable[..., list[int]]) -> None:
    assert unchanged(method, [20, 40]) == [0, 1, 2, 3, 4, 5, 6]


def test_only_the_upper_half_has_gists(states: list[GistState]) -> None:
    assert states[0].lengths.tolist() == [0, 0, 18, 18, 18, 18]


def test_one_gist_for_a_whole_passage(backbone: Backbone, ids: Tensor) -> None:
    method = make_compressor("incomes", backbone, {"per": "passage"})
    with torch.no_grad():
        [state] = method.compress([ids])
    assert state.lengths.tolist() == [0, 0, 1, 1, 1, 1]


@torch.no_grad()
def test_a_second_softmax_with_a_zero_gist_reads_it(
    method: InComeS, states: list[GistState]
) -> None:
    """The paper's own form: the learned key in front, keys as they were, value zero."""
    slots = compose([[Placed(states[0], 7)]], method.backbone)
    assert slots is not None
    query = torch.randn(1, 6, 3, 16)
    ours = read_bank(Reading(slots), 2, query, 0.25)
    keys, values, _ = states[0].dense()
    for head in range(6):
        zero = method.zero[1, head // 3]
        every = torch.cat((zero[None], keys[2, head // 3] + zero))
        share = (query[0, head] @ every.T * 0.25 / 0.45).softmax(-1)
        theirs = share @ torch.cat((torch.zeros(1, 16), values[2, head // 3]))
        assert torch.allclose(ours[0, head], theirs, atol=1e-4)


def test_order_of_passages_does_not_matter(
    method: InComeS, states: list[GistState], ids: Tensor
) -> None:
    one = read(method.backbone, states, ids[:7])
    other = read(method.backbone, [states[2], states[0], states[1]], ids[:7])
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, read(method.backbone, states[:2], ids[:7]), atol=1e-2)


def test_where_the_zero_gist_wins_the_question_is_read_alone(
    method: InComeS, states: list[GistState], ids: Tensor
) -> None:
    silent = [replace(s, bias=torch.full_like(s.bias, -1e4)) for s in states]
    ours = read(method.backbone, silent, ids[:7])
    plain = read(method.backbone, [], ids[:7])
    assert torch.allclose(ours, plain, atol=1e-4)
    assert not torch.allclose(read(method.backbone, states, ids[:7]), plain, atol=1e-2)


def test_a_bank_takes_no_positions(states: list[GistState], ids: Tensor) -> None:
    _, text = arrange([*states, ids], 30, "sequence")
    assert text.positions.tolist() == list(range(30, 78))


@pytest.mark.parametrize(
    ("entries", "sharpened"), [(MANY - 1, False), (MANY, True)], ids=["few", "many"]
)
def test_a_large_bank_is_sharpened(
    method: InComeS, ids: Tensor, entries: int, sharpened: bool
) -> None:
    with torch.no_grad():
        [state] = method.compress([ids[: int(entries * 8 / 3)]])
    assert state.lengths.max() == entries
    warm = replace(state, bank=1.0)
    same = torch.equal(*(read(method.backbone, [s], ids[:7]) for s in (state, warm)))
    assert same is not sharpened


def test_it_learns_without_sharpening(method: InComeS, ids: Tensor) -> None:
    [state] = method.compress([ids])
    assert state.bank == 1.0
    assert states_of(method, ids).bank == 0.45


@torch.no_grad()
def states_of(method: InComeS, ids: Tensor) -> GistState:
    return method.compress([ids])[0]


def test_the_zero_gist_learns(method: InComeS, ids: Tensor) -> None:
    [state] = method.compress([ids])
    slots = compose([[Placed(state, 0)]], method.backbone)
    context = Context([method.backbone.prefix(ids[:0])], slots)
    out = method.backbone.read(context, [Local.after(ids[:5], 0, 1)])
    out.square().mean().backward()  # type: ignore[no-untyped-call]
    assert method.zero.grad is not None
    assert bool((method.zero.grad.abs().amax((1, 2)) > 0).all())


@torch.no_grad()
def test_a_batch_of_prompts_equals_one_by_one(
    method: InComeS, states: list[GistState], ids: Tensor
) -> None:
    backbone, questions = method.backbone, [ids[:7], ids[20:24]]
    rows = [
        arrange([*given, question], 0, "parallel")
        for given, question in zip((states, states[:1]), questions, strict=True)
    ]
    slots = compose([placed for placed, _ in rows], backbone)
    context = Context([backbone.prefix(ids[:0])] * 2, slots)
    both = backbone.read(context, [text for _, text in rows])
    assert torch.allclose(both[0], read(backbone, states, questions[0]), atol=1e-4)
    assert torch.allclose(both[1, 3:], read(backbone, states[:1], questions[1]), atol=1e-4)


def test_a_bank_and_other_gists_do_not_mix(
    method: InComeS, states: list[GistState], ids: Tensor
) -> None:
    with torch.no_grad():
        [other] = make_compressor("strided", method.backbone).compress([ids])
    with pytest.raises(BadInput, match="one compressor"):
        compose([[Placed(states[0], 0)], [Placed(other, 0)]], method.backbone)


def test_what_the_passage_makes_likelier_is_learnt(method: InComeS, ids: Tensor) -> None:
    """Three tokens: told likelier by 2 nats, as likely, and less likely than guessed."""

    def logits(*told: float) -> Tensor:
        """Rows over two tokens whose first has the given log-probabilities."""
        p = torch.tensor(told).exp()
        return torch.stack((p, 1 - p), dim=1).log()

    targets = torch.zeros(3, dtype=torch.long)
    answers = Answers(
        student=logits(-1.5, -9.0, -9.0),
        teacher=logits(-1.0, -1.0, -2.0),
        targets=targets,
        weights=torch.full((3,), 1 / 3),
        closed=logits(-3.0, -1.0, -1.0),
    )
    assert float(method.answer_losses(answers)["ce"]) == pytest.approx(0.5 * 2 * 1.5, rel=1e-4)
    assert method.answer_losses(answers).keys() == method.loss_weights.keys()


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_the_store_keeps_that_it_is_a_bank(states: list[GistState], codec: str) -> None:
    again = unpack(from_bytes(to_bytes(pack(states[0], codec))))
    assert again.bank == 0.45
    assert again.lengths.tolist() == states[0].lengths.tolist()


def test_a_bank_that_cannot_be_is_refused(states: list[GistState]) -> None:
    damaged = to_bytes(pack(states[0], "bf16")).replace(b'"bank": 0.45', b'"bank": "no"')
    with pytest.raises(CorruptEntry, match="temperature"):
        from_bytes(damaged)


def test_an_engine_serves_it_in_any_order(
    make_engine: Callable[..., GistEngine], passages: list[Passage]
) -> None:
    engine = make_engine("incomes", settings={"ratio": 4.0, "reluctance": 0.0})
    engine.precompute(passages[:3])
    a, b, c = (p.text for p in passages[:3])

    def ask(*texts: str) -> tuple[str, int]:
        prompt = "\n\n".join((*texts, "Question: what is a page?"))
        answer = engine.generate(prompt, Sampling(max_tokens=8), gist_mode="require")
        return answer.text, answer.stats.hits

    assert ask(a, b, c) == ask(c, a, b)
    assert ask(a, b, c)[1] == 3
