"""Expanding on demand: doubtful prompts are read again, with what matters as text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from gist_rag.attention import ATTENTION
from gist_rag.backbone import Backbone, Context
from gist_rag.compose import arrange, compose
from gist_rag.compressors import make_compressor
from gist_rag.engine import GistEngine
from gist_rag.expand import Expand
from gist_rag.types import Passage, Sampling

QUESTION = "\n\nWhat is SQLite?"
ALWAYS, NEVER = 0.0, 1e9


def prompt(passages: list[Passage]) -> str:
    return "\n\n".join(p.text for p in passages) + QUESTION


def test_a_sure_answer_is_read_from_gists(
    make_engine: Callable[..., GistEngine], passages: list[Passage]
) -> None:
    engine = make_engine(settings={"ratio": 4}, expand=Expand(NEVER))
    engine.precompute(passages[:3])
    answer = engine.generate(prompt(passages[:3]), Sampling(max_tokens=4))
    assert (answer.stats.hits, answer.stats.expanded) == (3, 0)


@pytest.mark.parametrize("many", [1, 2, 9])
def test_a_doubtful_one_reads_what_matters_as_text(
    make_engine: Callable[..., GistEngine], passages: list[Passage], many: int
) -> None:
    engine = make_engine(settings={"ratio": 4}, expand=Expand(ALWAYS, many))
    engine.precompute(passages[:3])
    answer = engine.generate(prompt(passages[:3]), Sampling(max_tokens=4))
    assert answer.stats.expanded == min(many, 3)
    assert answer.stats.hits == 3 - min(many, 3)
    if many > 2:  # nothing is left as a gist
        plain = engine.generate(prompt(passages[:3]), Sampling(max_tokens=4), gist_mode="off")
        assert answer.text == plain.text


def test_each_prompt_of_a_batch_for_itself(
    make_engine: Callable[..., GistEngine], passages: list[Passage]
) -> None:
    """One with gists, one without passages: the latter has nothing to expand."""
    engine = make_engine(settings={"ratio": 4}, expand=Expand(ALWAYS))
    engine.precompute(passages[:2])
    prompts = [prompt(passages[:2]), QUESTION]
    together = engine.batch(prompts, Sampling(max_tokens=4))
    alone = [engine.batch([p], Sampling(max_tokens=4))[0] for p in prompts]
    assert [a.text for a in together] == [a.text for a in alone]
    assert [a.stats.expanded for a in together] == [1, 0]


def test_shares_are_those_of_one_plain_pass(any_backbone: Backbone) -> None:
    """Uncompressed gists in sequence are the text: their shares are attention as torch has it."""
    backbone = any_backbone
    torch.manual_seed(0)
    ids = [torch.randint(5, 200, (n,)) for n in (5, 7, 4)]
    states = make_compressor("full", backbone).compress(ids[:2])
    placed, text = arrange([*states, ids[2]], 0, "sequence")
    context = Context([backbone.prefix(ids[0][:0])], compose([placed], backbone))
    opened = backbone.open(context, [text], watch=True)
    [shares] = backbone.attention_shares(opened)

    backbone.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            mask = torch.ones(16, 16, dtype=torch.bool).tril()
            mask[5:12, :5] = False  # the second passage was encoded alone
            positions = torch.arange(16)[None]
            weights = backbone.model(
                torch.cat(ids)[None],
                position_ids=positions,
                attention_mask=torch.zeros(16, 16).masked_fill(~mask, -torch.inf)[None, None],
                output_attentions=True,
            ).attentions
    finally:
        backbone.model.set_attn_implementation(ATTENTION)
    last = torch.stack([w[0, :, -1] for w in weights]).mean((0, 1))
    assert shares.tolist() == pytest.approx(
        [float(last[:5].sum()), float(last[5:12].sum())], abs=1e-4
    )
