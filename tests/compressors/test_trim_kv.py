"""``trim_kv``: gates that score tokens, soft while they learn, hard when they are used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, compose
from gist_rag.compressors import make_compressor
from gist_rag.compressors.base import Lesson, Thoughts
from gist_rag.compressors.trim_kv import TrimKV, TrimmedCache
from gist_rag.errors import BadInput, ContextOverflow
from gist_rag.losses import capacity, distill
from gist_rag.types import GistState, Sampling


@pytest.fixture
def make(backbone: Backbone) -> Callable[..., TrimKV]:
    """Methods whose gates tell tokens apart."""

    def build(**settings: object) -> TrimKV:
        method = make_compressor("trim_kv", backbone, {"ratio": 4.0, "start": 4.0, **settings})
        assert isinstance(method, TrimKV)
        for weight in (method.gates.down, method.gates.up):
            torch.nn.init.normal_(weight, std=0.3)
        return method

    return build


def uncompressed(method: TrimKV, ids: Tensor) -> GistState:
    return make_compressor("full", method.backbone).compress([ids])[0]


@torch.no_grad()
def log_beta(method: TrimKV, ids: Tensor) -> Tensor:
    """``(L * H, T)`` by a second way: layer by layer."""
    stream, gates, out = method.backbone.encode(ids[None])[:, 0], method.gates, []
    for index, layer in enumerate(method.backbone.layers):
        inner = layer.input_layernorm(stream[index]) @ gates.down[index] + gates.down_bias[index]
        gate = (inner * inner.sigmoid()) @ gates.up[index] + gates.up_bias[index]
        out.append(gate.sigmoid().log().T)
    return torch.cat(out)


def logits(method: TrimKV, state: GistState, question: Tensor) -> Tensor:
    backbone = method.backbone
    prefix = backbone.prefix(question[:0])
    context = Context([prefix], compose([[Placed(state, 0)]], backbone))
    return backbone.read(context, [Local.after(question, state.span, 1)])


def test_only_gates_learn(make: Callable[..., TrimKV]) -> None:
    assert all(name.startswith("gates.") for name, _ in make().named_parameters())


def test_while_it_learns_all_tokens_are_there_and_fade(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    method = make(horizon=100)
    [state] = method.compress([ids])
    faded = log_beta(method, ids) * (48 + 100 - torch.arange(48))
    assert state.lengths.tolist() == [48] * 6
    assert torch.allclose(state.bias.view(6, 48), faded, atol=1e-3)


def test_the_answer_teaches_gates_of_every_layer(make: Callable[..., TrimKV], ids: Tensor) -> None:
    method = make()
    [state] = method.compress([ids])
    logits(method, state, ids[:5]).square().mean().backward()  # type: ignore[no-untyped-call]
    assert method.gates.down.grad is not None
    assert bool((method.gates.down.grad.abs().amax((1, 2)) > 0).all())
    assert all(p.grad is None for p in method.backbone.model.parameters())


@torch.no_grad()
def test_every_head_keeps_its_best(make: Callable[..., TrimKV], ids: Tensor) -> None:
    method = make()
    [state] = method.compress([ids])
    best = log_beta(method, ids).topk(12, dim=1).indices.sort(1).values
    assert state.offsets.view(6, 12).tolist() == best.tolist()
    assert len({tuple(row) for row in best.tolist()}) > 1
    assert state.span == 48
    assert not state.bias.any()


@torch.no_grad()
def test_what_is_kept_is_the_plain_kv(make: Callable[..., TrimKV], ids: Tensor) -> None:
    method = make()
    [state], [full] = (
        method.compress([ids]),
        make_compressor("full", method.backbone).compress([ids]),
    )
    place = state.row_of_slot() * 48 + state.offsets
    assert torch.equal(state.keys, full.keys[place])
    assert torch.equal(state.values, full.values[place])


@torch.no_grad()
def test_under_one_budget_heads_keep_what_they_need(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    [state] = make(budget="global").compress([ids])
    assert state.num_slots == 6 * 12
    assert len(set(state.lengths.tolist())) > 1


def test_untrained_gates_keep_everything_soft(make: Callable[..., TrimKV], ids: Tensor) -> None:
    method = make_compressor("trim_kv", make().backbone, {"start": 18.0})
    assert isinstance(method, TrimKV)
    [soft], [full] = (
        method.compress([ids]),
        make_compressor("full", method.backbone).compress([ids]),
    )
    close = torch.allclose(logits(method, soft, ids[:5]), logits(method, full, ids[:5]), atol=1e-2)
    assert close


def test_capacity_by_hand() -> None:
    """Heads filled to 3 and to 1, a budget of 2, 4 tokens: (1 + 0) / 2 heads / 4 tokens."""
    assert float(capacity(torch.tensor([3.0, 1.0]), 2.0, 4)) == pytest.approx(0.125)


def test_the_capacity_term_is_what_is_left_above_the_budget(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    method = make()
    [state] = method.compress([ids])
    lesson = Lesson([ids], torch.empty(0), [state])
    left = (log_beta(method, ids) * (48 + 256 - torch.arange(48))).exp().sum(1)
    expected = sum(max(0.0, float(x) - 12) for x in left) / 6 / 48
    assert float(method.passage_losses(lesson)["cap"].detach()) == pytest.approx(expected, rel=1e-3)


def test_the_capacity_term_is_learnt(
    backbone: Backbone, ids: Tensor, lowers: Callable[..., bool]
) -> None:
    method = make_compressor("trim_kv", backbone, {"ratio": 4.0})

    def loss() -> Tensor:
        states = method.compress([ids])
        lesson = Lesson([ids], torch.empty(0), states)
        return method.passage_losses(lesson)["cap"]

    assert lowers(method, loss)


# ---- fading while a passage is read


def lesson(method: TrimKV, passages: list[Tensor]) -> Lesson:
    hidden = method.encode(passages)
    return Lesson(passages, hidden, method.distil(hidden, passages))


def test_gates_that_hold_on_read_as_the_plain_model(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    """With beta = 1 nothing fades; padding of a shorter passage does not count."""
    method = make(fade=True)
    for weight in (method.gates.down, method.gates.up):
        torch.nn.init.zeros_(weight)
    torch.nn.init.constant_(method.gates.up_bias, 40.0)
    assert float(method.passage_losses(lesson(method, [ids, ids[:9]]))["fade"].detach()) < 1e-6


def test_what_fades_is_read_less_in_every_layer(make: Callable[..., TrimKV], ids: Tensor) -> None:
    """Against a second way: the model's own attention, given the decay as a mask of floats."""
    method = make(fade=True)
    given = lesson(method, [ids])
    age = torch.arange(48)[:, None] - torch.arange(48)
    decay = (log_beta(method, ids).view(3, 2, 1, 48) * age).masked_fill(age < 0, -torch.inf)
    model, stream = method.backbone.model, method.backbone.embed(ids[None])
    rotary = model.model.rotary_emb(stream, position_ids=torch.arange(48)[None])
    with torch.no_grad():
        for index, layer in enumerate(method.backbone.layers):
            group = layer.self_attn.num_key_value_groups
            mask = decay[index].repeat_interleave(group, dim=0)[None]
            stream = layer(stream, attention_mask=mask, position_embeddings=rotary)
    wanted = distill(method.backbone.logits(given.hidden[-1]), method.backbone.logits(stream))
    expected = float(wanted[0, :-1].mean())
    assert expected > 1e-3
    assert float(method.passage_losses(given)["fade"].detach()) == pytest.approx(expected, rel=1e-3)
    thought = method.thought_losses([Thoughts(ids, [10, 30, 48])])["kl"]
    assert float(thought.detach()) == pytest.approx(float(wanted[0, 9:-1].mean()), rel=1e-3)


def test_fading_teaches_gates_of_every_layer(make: Callable[..., TrimKV], ids: Tensor) -> None:
    method = make(fade=True)
    method.passage_losses(lesson(method, [ids]))["fade"].backward()  # type: ignore[no-untyped-call]
    assert method.gates.down.grad is not None
    assert bool((method.gates.down.grad.abs().amax((1, 2)) > 0).all())


def test_a_passage_of_one_token_has_nothing_to_fade(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    method = make(fade=True)
    assert float(method.passage_losses(lesson(method, [ids[:1]]))["fade"].detach()) == 0


def test_thoughts_stand_above_their_budget_at_each_token(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    method = make(start=2.0, ratio=4.0)
    passages = [ids, ids[:30]]
    loss = method.thought_losses([Thoughts(p, [10, len(p)]) for p in passages])["cap"]
    over = []
    for passage in passages:
        fading = log_beta(method, passage)  # (L * H, T)
        size = len(passage)
        for t in range(size):
            held = (fading[:, : t + 1] * (t - torch.arange(t + 1))).exp().sum(1)
            over.append((held - size / 4).relu().mean() / (t + 1) / size)
    assert float(loss.detach()) == pytest.approx(float(sum(over)) / 2, rel=1e-4)
    assert float(loss.detach()) > 0.01


def test_thoughts_far_back_leave_gradients_finite(make: Callable[..., TrimKV], ids: Tensor) -> None:
    """exp of an age below zero would be infinite, and its gradient no number."""
    method = make(start=-30.0)
    torch.stack([*method.thought_losses([Thoughts(ids, [10, 48])]).values()]).sum().backward()  # type: ignore[no-untyped-call]
    grads = [weight.grad for weight in method.gates.parameters()]
    assert all(grad is not None and bool(grad.isfinite().all()) for grad in grads)


# ---- trimming while decoding


def test_with_room_for_all_it_decodes_as_the_plain_model(
    make: Callable[..., TrimKV], ids: Tensor
) -> None:
    method, nothing = make(), torch.empty(0, dtype=torch.long)
    context = Context([method.backbone.prefix(nothing)], None)
    plain = method.backbone.decode(context, [Local.after(ids, 0, 0)], [Sampling(max_tokens=12)])
    ours = method.decode(ids, budget=100, max_tokens=12)
    assert list(ours) == [token for [token] in plain]


@torch.no_grad()
def test_every_head_stays_under_its_budget(make: Callable[..., TrimKV], ids: Tensor) -> None:
    trimmed, sizes = TrimmedCache(make(), budget=20, slack=4), []
    trimmed.read(ids)
    for token in ids[:15]:
        trimmed.read(token[None])
        sizes.append(trimmed.cache.get_seq_length())
    assert sizes == [21, 22, 23, 20] * 3 + [21, 22, 23]
    assert trimmed.positions.shape == (3, 2, 23)
    assert trimmed.length == 63


@torch.no_grad()
@pytest.mark.parametrize("horizon", [0, 64])
def test_the_best_entries_stay_as_they_were(
    make: Callable[..., TrimKV], ids: Tensor, horizon: int
) -> None:
    method = make()
    trimmed = TrimmedCache(method, 20, 4, horizon)
    whole = TrimmedCache(method, 100, 4)
    trimmed.read(ids)
    whole.read(ids)
    scores = log_beta(method, ids) * (48 + horizon - torch.arange(48))
    best = scores.topk(20, dim=1).indices.sort(1).values
    assert trimmed.positions.flatten(0, 1).tolist() == best.tolist()
    for ours, theirs, kept in zip(
        trimmed.cache.layers, whole.cache.layers, trimmed.positions, strict=True
    ):
        for head in range(2):
            assert torch.equal(ours.keys[0, head], theirs.keys[0, head, kept[head]])
            assert torch.equal(ours.values[0, head], theirs.values[0, head, kept[head]])


def test_decoding_ends_at_max_tokens(make: Callable[..., TrimKV], ids: Tensor) -> None:
    assert len(list(make().decode(ids, budget=8, slack=1, max_tokens=5))) <= 5


def test_what_cannot_be_decoded_is_refused(make: Callable[..., TrimKV], ids: Tensor) -> None:
    with pytest.raises(BadInput, match="prompt"):
        next(make().decode(ids[:0], budget=8))
    with pytest.raises(BadInput, match="horizon"):
        next(make().decode(ids, budget=8, horizon=-1))
    with pytest.raises(ContextOverflow, match="4096"):
        next(make().decode(ids, budget=8, max_tokens=5000))
