"""``light_thinker``: cache tokens and ``[o]``, for passages and for thoughts while decoding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gist_rag.backbone import Backbone
from gist_rag.compressors import make_compressor
from gist_rag.compressors.base import Compressor, Thoughts
from gist_rag.compressors.light_thinker import LightThinker
from gist_rag.errors import BadInput, ContextOverflow
from gist_rag.layout import Layout

MASK = """\
x
xx
xxx
xxxx
x.xxx
x.xxxx
x.xxxxx
x.xxxxxx
x.xxxxxxx
x.xxx..xxx"""


@pytest.fixture
def method(backbone: Backbone, taught: Callable[[Compressor], Compressor]) -> LightThinker:
    settings = {"ratio": 4.0, "cache_tokens": 2, "sinks": 0}
    made = taught(make_compressor("light_thinker", backbone, settings))
    assert isinstance(made, LightThinker)
    return made


def test_mask(method: LightThinker, drawn: Callable[[Layout], str]) -> None:
    """The mask of the docstring: S a c c o b b c c o."""
    layout = method._layout([2, 4], [3, 3], 1)
    assert drawn(layout) == MASK
    assert layout.source.tolist() == [0, 1, -2, -3, -1, 2, 3, -2, -3, -1]
    assert layout.position.tolist() == list(range(10))


def test_every_kept_slot_counts_against_the_ratio(method: LightThinker, ids: Tensor) -> None:
    layout = method.layout(ids)
    assert int(layout.is_gist.sum()) == 12  # four units of c c o
    assert (layout.source == -1).nonzero().diff(dim=0).unique().tolist() == [15]


def test_units_end_at_lines_if_asked(backbone: Backbone) -> None:
    ids = backbone.tokenize("The first line is rather long, isn't it?\nA second one.\n")
    settings = {"ratio": len(ids) / 6, "cache_tokens": 2, "units": "line"}  # two units
    layout = make_compressor("light_thinker", backbone, settings).layout(ids)
    first = int((layout.source < 0).nonzero()[0])
    assert backbone.tokenizer.decode(ids[first - 1]).endswith("\n")


def test_later_text_never_reaches_earlier_slots(
    method: LightThinker, unchanged: Callable[..., list[int]]
) -> None:
    assert unchanged(method, [13, 20]) == [0, 1, 2]
    assert unchanged(method, [47]) == list(range(9))


@torch.no_grad()
def test_the_continue_token_sees_no_text(method: LightThinker, ids: Tensor) -> None:
    """In the first layer, where nothing has come by way of cache tokens, it knows no thought."""
    layout = method.layout(ids)
    blind = (layout.source == -1).nonzero()[0, 0]
    other = ids.clone()
    other[:12] += 1
    ours, theirs = (method.encode([i], [layout])[1, 0, blind] for i in (ids, other))
    assert torch.equal(ours, theirs)


def test_language_term_learns(
    method: LightThinker, ids: Tensor, lowers: Callable[..., bool]
) -> None:
    def loss() -> Tensor:
        return method.language_loss(method.encode([ids])[-1], [ids], [method.layout(ids)])

    assert lowers(method, loss)


# ---- thinking


def speak(method: LightThinker, words: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes the model say given tokens; returns the logits behind each, as they come."""
    said, extend = iter(words), method.backbone.extend
    seen: list[Tensor] = []

    def say(*args: object, **kwargs: object) -> Tensor:
        seen.append(extend(*args, **kwargs))  # type: ignore[arg-type]
        if "mask" in kwargs and kwargs["mask"] is not None:
            spoken = seen.pop()
            seen[-1] = spoken  # what comes after a thought is told by [o]
            return torch.nn.functional.one_hot(torch.tensor(pending[0]), len(spoken)).float()
        pending[:] = [next(said, min(method.backbone.stop_ids))]
        return torch.nn.functional.one_hot(torch.tensor(pending[0]), len(seen[-1])).float()

    pending: list[int] = []
    monkeypatch.setattr(method.backbone, "extend", say)
    return seen


@pytest.mark.parametrize("adapt", ["gists", "all"])
@pytest.mark.parametrize("start", ["learned", "token"])
def test_thinking_equals_one_masked_pass(
    backbone: Backbone,
    taught: Callable[[Compressor], Compressor],
    monkeypatch: pytest.MonkeyPatch,
    start: str,
    adapt: str,
) -> None:
    settings = {"cache_tokens": 2, "adapt": adapt, "start": start}
    method = taught(make_compressor("light_thinker", backbone, settings))
    assert isinstance(method, LightThinker)
    prompt = backbone.tokenize("How many pages are there?")
    thoughts = [backbone.tokenize(t) for t in ("Two and two.\n\n", "That is four.\n\n", "4")]
    ids = torch.cat((prompt, *thoughts))
    ends = torch.tensor([len(t) for t in thoughts]).cumsum(0) + len(prompt)
    layout = method.thought_layout(Thoughts(ids, [len(prompt), *ends.tolist()]))
    with torch.no_grad():
        hidden = method.encode([ids], [layout])[-1, 0]
        before = (~layout.is_gist).nonzero()[len(prompt) :, 0] - 1
        oracle = backbone.logits(hidden[before])

    seen = speak(method, ids[len(prompt) :].tolist(), monkeypatch)
    tokens = list(method.decode(prompt, max_tokens=40))
    assert tokens[:-1] == ids[len(prompt) :].tolist()
    assert torch.allclose(torch.stack(seen[: len(oracle)]), oracle, atol=1e-3)


def test_finished_thoughts_leave_only_their_cache_tokens(
    method: LightThinker, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = method.backbone.tokenize("How many?")
    thoughts = [method.backbone.tokenize(t) for t in ("Two and two.\n\n", "Is four.\n\n", "4")]
    speak(method, torch.cat(thoughts).tolist(), monkeypatch)
    cache = DynamicCache(config=method.backbone.model.config)
    sizes = [cache.get_seq_length() for _ in method.decode(prompt, max_tokens=40, cache=cache)]
    assert sizes[-1] == len(prompt) + 2 * 3 + len(thoughts[-1])
    assert max(sizes) < len(prompt) + sum(map(len, thoughts))


def test_thinking_ends_at_max_tokens(method: LightThinker) -> None:
    prompt = method.backbone.tokenize("How many?")
    assert len(list(method.decode(prompt, max_tokens=5))) <= 5
    with pytest.raises(ContextOverflow, match="do not fit"):
        next(method.decode(prompt, max_tokens=10_000))


def test_thinking_leaves_no_update_behind(method: LightThinker, ids: Tensor) -> None:
    with torch.no_grad():
        before = method.backbone.encode(ids[None])
        stopped = method.decode(ids, max_tokens=9)
        next(stopped)
        assert torch.equal(method.backbone.encode(ids[None]), before)


def test_other_methods_say_that_they_cannot(backbone: Backbone) -> None:
    with pytest.raises(BadInput, match="does not compress its own thoughts"):
        make_compressor("gisting", backbone).thought_losses([])
