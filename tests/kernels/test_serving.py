"""Compressing and serving with Triton kernels give what they give with plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, compose, place
from gist_rag.compressors import make_compressor
from gist_rag.layout import Slots
from gist_rag.store import pack, unpack
from gist_rag.types import GistState, Passage, Sampling
from gist_rag_kernels import gist_attention


@pytest.fixture
def states(
    backbone: Backbone, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> list[GistState]:
    """Ragged ones, of different lengths."""
    monkeypatch.setenv("GIST_RAG_KERNELS", "reference")
    compressor = make_compressor("attention_matching", backbone, {"ratio": 4, "preset": "fast"})
    with torch.no_grad():
        return compressor.compress([backbone.tokenize(p.text)[:24] for p in passages[:3]])


def prompts(backbone: Backbone, states: list[GistState]) -> tuple[Context, list[Local]]:
    """Two prompts: text between two passages, and one passage behind a longer prefix."""
    prefixes = [backbone.prefix(backbone.tokenize(t)) for t in ("Read:", "Read this text:")]
    first, middle = place(states[:1], len(prefixes[0]), "parallel")
    between = Local.after(backbone.tokenize(" and "), middle, 1)
    second, end = place(states[1:2], middle + len(between.ids), "parallel")
    question = backbone.tokenize("What is it?")
    third, last = place(states[2:], len(prefixes[1]), "parallel")
    texts = [
        Local.join([between, Local.after(question, end, 2)]),
        Local.after(question, last, 1),
    ]
    return Context(prefixes, compose([[*first, *second], third], backbone)), texts


@torch.no_grad()
def test_compressing_keeps_the_same_slots(
    backbone: Backbone, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = make_compressor("attention_matching", backbone, {"ratio": 4})
    ids = [backbone.tokenize(p.text)[:12] for p in passages[:1]]
    monkeypatch.setenv("GIST_RAG_KERNELS", "reference")
    plain = compressor.compress(ids)
    monkeypatch.setenv("GIST_RAG_KERNELS", "triton")
    for ours, theirs in zip(compressor.compress(ids), plain, strict=True):
        assert torch.equal(ours.offsets, theirs.offsets)
        assert torch.equal(ours.lengths, theirs.lengths)
        assert torch.allclose(ours.values, theirs.values, atol=1e-3)
        assert torch.allclose(ours.bias, theirs.bias, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"), [("gist_pool", {}), ("unigist", {"window": 8, "sinks": 4})]
)
def test_passages_with_gists_among_them_are_encoded_the_same(
    backbone: Backbone,
    passages: list[Passage],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    settings: dict[str, int],
) -> None:
    """And gist embeddings learn the same from it; passages of two lengths, and so that four sinks
    take four slots of one and, with a gist among them, five of the other."""
    compressor = make_compressor(method, backbone, {"ratio": 4, **settings})
    compressor.requires_grad_(True)
    ids = [backbone.tokenize(p.text)[:n] for p, n in zip(passages[:2], (24, 22), strict=True)]
    layers, found = [], []

    def counted(*args: Any, **kwargs: Any) -> Any:
        layers.append(args)
        return gist_attention(*args, **kwargs)

    monkeypatch.setattr("gist_rag.attention.gist_attention", counted)
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("GIST_RAG_KERNELS", kernels)
        compressor.zero_grad()
        states = compressor.compress(ids)
        sum(state.values.square().sum() for state in states).backward()
        embeddings = compressor.embeddings()
        assert embeddings is not None
        assert embeddings.grad is not None
        found.append((states, embeddings.grad.clone()))
        assert len(layers) == (backbone.num_layers if kernels == "triton" else 0)
    (plain, expected), (ours, grad) = found
    for state, truth in zip(ours, plain, strict=True):
        assert torch.allclose(state.keys, truth.keys, atol=1e-4)
        assert torch.allclose(state.values, truth.values, atol=1e-4)
    assert expected.abs().max() > 0
    assert torch.allclose(grad, expected, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_fading_while_a_passage_is_read_is_the_same(
    backbone: Backbone, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = backbone.tokenize(passages[0].text)[:24]
    log_beta = -torch.rand(backbone.num_layers, 1, backbone.num_heads, len(ids))
    monkeypatch.setenv("GIST_RAG_KERNELS", "reference")
    plain = backbone.encode(ids[None], log_beta=log_beta)
    monkeypatch.setenv("GIST_RAG_KERNELS", "triton")
    assert torch.allclose(backbone.encode(ids[None], log_beta=log_beta), plain, atol=1e-4)
    assert not torch.allclose(backbone.encode(ids[None]), plain, atol=1e-2)


@torch.no_grad()
def test_plain_prefill_and_decoding_with_flash_attn_are_the_same(
    backbone: Backbone, passages: list[Passage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What flash-attn documents: ``(B, S, H, D)``, fewer KV heads than query heads, and causal from
    the last query backwards. It is not installed here, so its place is taken."""
    calls = []

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool
    ) -> torch.Tensor:
        calls.append(q.shape[1])
        group, rows, keys = q.shape[2] // k.shape[2], q.shape[1], k.shape[1]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
        seen = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
        assert causal
        return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~seen, -torch.inf).softmax(-1), v)

    ids = backbone.tokenize(passages[0].text)

    def said() -> tuple[torch.Tensor, list[list[int | None]]]:
        context = Context([backbone.prefix(ids[:0])], None)
        text = [Local.after(ids, 0, 0)]
        answer = list(backbone.decode(context, text, [Sampling(max_tokens=3)]))
        return backbone.encode(ids[None]), answer

    plain, answer = said()
    monkeypatch.setattr("gist_rag.attention.flash_for", lambda query: flash_attn_func)
    ours, again = said()
    assert torch.allclose(ours, plain, atol=1e-4)
    assert again == answer
    assert set(calls) == {len(ids), 1}


@torch.no_grad()
def test_reading_is_the_same(
    backbone: Backbone, states: list[GistState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged heads, two prompts, tokens that come before a passage, left padding."""
    monkeypatch.setenv("GIST_RAG_KERNELS", "reference")
    plain = backbone.read(*prompts(backbone, states))
    monkeypatch.setenv("GIST_RAG_KERNELS", "triton")
    ours = backbone.read(*prompts(backbone, states))
    rows = len(prompts(backbone, states)[1][1].ids)
    assert torch.allclose(ours[0], plain[0], atol=1e-4)
    assert torch.allclose(ours[1, -rows:], plain[1, -rows:], atol=1e-4)  # the rest is padding


@torch.no_grad()
@pytest.mark.parametrize("codec", ["bf16", "int8", "int4"])
def test_stored_gists_are_packed_and_composed_the_same(
    backbone: Backbone, states: list[GistState], monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    batch = [[*place(states[:2], 5, "sequence")[0]], [], [*place(states[2:], 300, "sequence")[0]]]

    def composed(kernels: str) -> Slots:
        monkeypatch.setenv("GIST_RAG_KERNELS", kernels)
        stored = [[Placed(unpack(pack(p.state, codec)), p.start) for p in row] for row in batch]
        slots = compose(stored, backbone)
        assert slots is not None
        return slots

    plain, ours = composed("reference"), composed("triton")
    assert ours.widths == plain.widths
    assert torch.equal(ours.lengths, plain.lengths)
    assert torch.equal(ours.order, plain.order)
    for name in ("keys", "values", "bias"):
        assert torch.allclose(getattr(ours, name), getattr(plain, name), atol=1e-5), name


@torch.no_grad()
def test_decoding_is_the_same(
    backbone: Backbone, states: list[GistState], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens() -> list[list[int | None]]:
        context, texts = prompts(backbone, states)
        return list(backbone.decode(context, texts, [Sampling(max_tokens=3)] * 2))

    monkeypatch.setenv("GIST_RAG_KERNELS", "reference")
    plain = tokens()
    monkeypatch.setenv("GIST_RAG_KERNELS", "triton")
    assert tokens() == plain
