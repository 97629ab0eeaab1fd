"""Composing and reading: the promises that everything else stands on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, compose, place
from gist_rag.compressors import make_compressor
from gist_rag.errors import BadInput
from gist_rag.store import pack, unpack
from gist_rag.types import GistState, Passage, Sampling

TOLERANCE = 1e-4


def read(
    backbone: Backbone,
    states: list[GistState],
    question: Tensor,
    *,
    start: int = 0,
    prefix: str = "",
) -> Tensor:
    """Logits ``(Q, V)`` of a question after some states in sequence."""
    leading = backbone.prefix(backbone.tokenize(prefix))
    placed, end = place(states, start + len(leading), "sequence")
    context = Context([leading], compose([placed], backbone))
    with torch.no_grad():
        return backbone.read(context, [Local.after(question, end, len(states))])[0]


def prefill(backbone: Backbone, ids: Tensor, rows: int) -> Tensor:
    with torch.no_grad():
        return backbone.model(ids[None]).logits[0, -rows:]


def test_full_gist_reads_as_its_text_does(any_backbone: Backbone, passages: list[Passage]) -> None:
    ids = any_backbone.tokenize(passages[0].text)
    question = any_backbone.tokenize("\n\nWhat is WAL?")
    states = make_compressor("full", any_backbone).compress([ids])
    ours = read(any_backbone, states, question)
    plain = prefill(any_backbone, torch.cat((ids, question)), len(question))
    assert (ours - plain).abs().max() < TOLERANCE


def test_encoding_a_batch_equals_encoding_one_by_one(
    any_backbone: Backbone, passages: list[Passage]
) -> None:
    full = make_compressor("full", any_backbone)
    ids = [any_backbone.tokenize(p.text) for p in passages[:3]]
    for together, alone in zip(
        full.compress(ids), (full.compress([i])[0] for i in ids), strict=True
    ):
        assert torch.allclose(together.keys, alone.keys, atol=TOLERANCE)
        assert torch.allclose(together.values, alone.values, atol=TOLERANCE)


def test_moving_everything_by_1000_positions_changes_nothing(
    any_backbone: Backbone, passages: list[Passage]
) -> None:
    matching = make_compressor("attention_matching", any_backbone, {"ratio": 4})
    with torch.no_grad():
        states = matching.compress([any_backbone.tokenize(p.text) for p in passages[:2]])
    question = any_backbone.tokenize("What is WAL?")
    here = read(any_backbone, states, question)
    there = read(any_backbone, states, question, start=1000)
    assert (here - there).abs().max() < 1e-3


def test_prefix_is_exact(any_backbone: Backbone, passages: list[Passage]) -> None:
    text, question = any_backbone.tokenize(passages[0].text), any_backbone.tokenize("Why?")
    context = Context([any_backbone.prefix(text)], None)
    with torch.no_grad():
        ours = any_backbone.read(context, [Local.after(question, len(text), 0)])[0]
    plain = prefill(any_backbone, torch.cat((text, question)), len(question))
    assert (ours - plain).abs().max() < TOLERANCE


def test_parallel_passages_have_no_order(backbone: Backbone, passages: list[Passage]) -> None:
    full = make_compressor("full", backbone)
    states = full.compress([backbone.tokenize(p.text) for p in passages[:3]])
    question = backbone.tokenize("What is WAL?")
    results = []
    for order in ((0, 1, 2), (2, 0, 1)):
        placed, end = place([states[i] for i in order], 0, "parallel")
        context = Context([backbone.prefix(question[:0])], compose([placed], backbone))
        results.append(backbone.read(context, [Local.after(question, end, 3)]))
    assert (results[0] - results[1]).abs().max() < TOLERANCE


def test_a_batch_of_prompts_reads_as_each_alone(
    backbone: Backbone, passages: list[Passage]
) -> None:
    """Different passages, prefixes and questions: padding of none leaks into another."""
    matching = make_compressor("attention_matching", backbone, {"ratio": 4})
    with torch.no_grad():
        states = matching.compress([backbone.tokenize(p.text) for p in passages[:3]])
    prefixes = [
        backbone.prefix(backbone.tokenize(t)) for t in ("Documents:", "", "Read this now: ")
    ]
    members = [states[:2], [], states[2:]]
    questions = [backbone.tokenize(t) for t in ("What is WAL?", "Who?", "When was it, and where?")]
    prompts = []
    for prefix, member, question in zip(prefixes, members, questions, strict=True):
        placed, end = place(member, len(prefix), "parallel")
        prompts.append((prefix, placed, Local.after(question, end, len(member))))
    with torch.no_grad():
        together = backbone.read(
            Context([p for p, _, _ in prompts], compose([s for _, s, _ in prompts], backbone)),
            [t for _, _, t in prompts],
        )
        for row, (prefix, placed, text) in enumerate(prompts):
            alone = backbone.read(Context([prefix], compose([placed], backbone)), [text])[0]
            assert (together[row, -len(text.ids) :] - alone).abs().max() < TOLERANCE


@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_stored_gists_are_composed_as_the_floats_they_stand_for(
    backbone: Backbone, passages: list[Passage], codec: str
) -> None:
    """With gradients too; a prompt without passages gets its row of padding from both."""
    matching = make_compressor("attention_matching", backbone, {"ratio": 4, "preset": "fast"})
    with torch.no_grad():
        states = matching.compress([backbone.tokenize(p.text) for p in passages[:3]])
    stored = [unpack(pack(state, codec)) for state in states]
    floats = [state.floats(torch.float32) for state in stored]
    learnt = [replace(state, bias=state.bias.clone().requires_grad_()) for state in floats]
    wider = [replace(state, values=state.values.double()) for state in floats]
    as_stored, as_floats, with_gradients, mixed, uneven = (
        compose([place(s[:2], 7, "sequence")[0], [], place(s[2:], 1000, "sequence")[0]], backbone)
        for s in (stored, floats, learnt, [stored[0], *floats[1:]], wider)
    )
    assert with_gradients.bias.requires_grad
    assert as_stored.widths == as_floats.widths == with_gradients.widths == mixed.widths
    for name in ("keys", "values", "bias", "order", "lengths"):
        expected = getattr(as_floats, name).float()
        for other in (as_stored, with_gradients, mixed, uneven):
            assert torch.allclose(getattr(other, name).detach().float(), expected, atol=1e-5), name


def test_log_mass_is_composed_in_float32(backbone: Backbone, passages: list[Passage]) -> None:
    """Also where it is learnt in fewer digits."""
    [state] = make_compressor("full", backbone).compress([backbone.tokenize(passages[0].text)])
    for learnt in (False, True):
        half = replace(state, bias=state.bias.bfloat16().requires_grad_(learnt))
        slots = compose([[Placed(half, 0)]], backbone)
        assert slots is not None
        assert (slots.bias.dtype, slots.bias.requires_grad) == (torch.float32, learnt)


def test_text_before_a_passage_does_not_see_it(backbone: Backbone, passages: list[Passage]) -> None:
    [state] = make_compressor("full", backbone).compress([backbone.tokenize(passages[0].text)])
    before, after = backbone.tokenize("Listen:"), backbone.tokenize("What is WAL?")
    first = Local.after(before, 0, 0)
    second = Local.after(after, len(before) + state.span, 1)
    nothing = backbone.prefix(before[:0])
    slots = compose([[Placed(state, len(before))]], backbone)
    with torch.no_grad():
        mixed = backbone.read(Context([nothing], slots), [Local.join([first, second])])[0]
        alone = backbone.read(Context([nothing], None), [first])[0]
    assert (mixed[: len(before)] - alone).abs().max() < TOLERANCE


def test_dropped_slots_do_not_matter(backbone: Backbone, passages: list[Passage]) -> None:
    """A ragged state, padded for reading, equals the full state with the dropped slots hidden."""
    matching = make_compressor("attention_matching", backbone, {"ratio": 3, "preset": "fast"})
    ids = backbone.tokenize(passages[0].text)
    with torch.no_grad():
        [ragged] = matching.compress([ids])
        [full] = make_compressor("full", backbone).compress([ids])
    kept = torch.zeros(len(full.rows) - 1, len(ids), dtype=torch.bool)
    kept[ragged.row_of_slot(), ragged.offsets.long()] = True
    hidden = full.bias.masked_fill(~kept.flatten(), -1e4)
    masked = GistState(**{**vars(full), "bias": hidden})
    question = backbone.tokenize("What is WAL?")
    difference = read(backbone, [ragged], question) - read(backbone, [masked], question)
    assert difference.abs().max() < TOLERANCE


def test_reading_passes_gradients_to_the_slots(backbone: Backbone, passages: list[Passage]) -> None:
    [state] = make_compressor("full", backbone).compress([backbone.tokenize(passages[0].text)])
    for tensor in (state.keys, state.values, state.bias):
        tensor.requires_grad_()
    question = backbone.tokenize("What is WAL?")
    context = Context([backbone.prefix(question[:0])], compose([[Placed(state, 0)]], backbone))
    backbone.read(context, [Local.after(question, state.span, 1)]).square().sum().backward()
    assert all(float(t.grad.abs().sum()) > 0 for t in (state.keys, state.values, state.bias))


def test_greedy_decoding_equals_transformers(
    any_backbone: Backbone, passages: list[Passage]
) -> None:
    ids = any_backbone.tokenize(passages[0].text)
    expected = any_backbone.model.generate(
        ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=12, do_sample=False
    )[0, len(ids) :].tolist()
    context = Context([any_backbone.prefix(ids[:0])], None)
    steps = any_backbone.decode(context, [Local.after(ids, 0, 0)], [Sampling(max_tokens=12)])
    assert [tokens[0] for tokens in steps] == expected


@given(
    lengths=st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
    split=st.integers(0, 4),
)
@settings(max_examples=30, deadline=None)
def test_slots_hold_each_heads_keys_in_passage_order(
    backbone: Backbone, lengths: list[list[int]], split: int
) -> None:
    """Second route: rotate and concatenate head by head, prompt by prompt."""
    torch.manual_seed(0)
    states = [ragged(backbone, counts) for counts in lengths]
    prompts = [states[:split], states[split:]]
    placed = [place(states, 7, "sequence")[0] for states in prompts]
    slots = compose(placed, backbone)
    assert slots is not None
    for row, prompt in enumerate(placed):
        for layer in range(backbone.num_layers):
            part = slots.row(layer, row)
            keys, values, bias, order = (
                x[0] for x in (part.keys, part.values, part.bias, part.order)
            )
            for head in range(backbone.num_heads):
                expected = [
                    one_head(backbone, p, layer * backbone.num_heads + head) for p in prompt
                ]
                kept = bias[head].isfinite()
                assert int(kept.sum()) == sum(len(k) for k, _ in expected)
                if not expected:
                    continue
                want = torch.cat([k for k, _ in expected])
                assert torch.allclose(keys[head, : len(want)], want, atol=1e-5)
                assert torch.equal(values[head, : len(want)], torch.cat([v for _, v in expected]))
                numbers = [i for i, (k, _) in enumerate(expected) for _ in k]
                assert order[head, : len(want)].tolist() == numbers


def ragged(backbone: Backbone, counts: list[int]) -> GistState:
    """A random state that keeps so many slots in each (layer, head)."""
    total = sum(counts)
    rows = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return GistState(
        keys=torch.randn(total, backbone.head_dim),
        values=torch.randn(total, backbone.head_dim),
        bias=torch.randn(total),
        offsets=torch.randint(0, 30, (total,), dtype=torch.int32),
        rows=rows,
        num_layers=backbone.num_layers,
        span=30,
        num_tokens=30,
    )


def one_head(backbone: Backbone, placed: Placed, row: int) -> tuple[Tensor, Tensor]:
    """Rotated keys and values of one head of one passage."""
    state = placed.state
    part = slice(int(state.rows[row]), int(state.rows[row + 1]))
    cos, sin = backbone.rotary(state.offsets[part] + placed.start)
    keys = state.keys[part]
    left, right = keys.chunk(2, dim=-1)
    return keys * cos + torch.cat((-right, left), -1) * sin, state.values[part]


def test_state_of_another_shape_is_refused(backbone: Backbone) -> None:
    keys = torch.zeros(2, 2, 4, 16)
    state = GistState.uniform(keys, keys, torch.arange(4), span=4, num_tokens=4)
    with pytest.raises(BadInput, match=r"\(2, 2, 16\)"):
        compose([[Placed(state, 0)]], backbone)


def test_a_layer_that_keeps_nothing_is_read(backbone: Backbone) -> None:
    """Under one budget a whole layer may lose all slots; its queries still see their own text."""
    keys = torch.randn(8, backbone.head_dim)
    rows = torch.tensor([0, 4, 8, 8, 8, 8, 8], dtype=torch.int32)
    offsets = torch.arange(8, dtype=torch.int32)
    state = GistState(keys, keys, torch.zeros(8), offsets, rows, 3, span=8, num_tokens=8)
    logits = read(backbone, [state], backbone.tokenize("What is WAL?"), prefix="Read this:")
    assert bool(logits.isfinite().all())
    assert read(backbone, [state], backbone.tokenize("What is WAL?")).isfinite().all()


def test_a_weight_is_added_to_the_log_mass(backbone: Backbone, passages: list[Passage]) -> None:
    """Of one passage, in float32, whatever its gists are in."""
    states = make_compressor("attention_matching", backbone, {"ratio": 4}).compress(
        [backbone.tokenize(p.text) for p in passages[:2]]
    )
    halved = [replace(s, bias=s.bias.bfloat16()) for s in states]
    plain = compose([[Placed(s, 5) for s in halved]], backbone)
    given = compose([[Placed(halved[0], 5), Placed(halved[1], 5, -0.123456)]], backbone)
    assert plain is not None
    assert given is not None
    expected = plain.bias - 0.123456 * (plain.order == 1)
    assert given.bias.dtype == torch.float32
    assert torch.allclose(given.bias, expected, atol=1e-6)
