"""Several readings, one answer."""

from __future__ import annotations

import pytest
import torch

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.mixture import Mixture
from gist_rag.types import Sampling


def test_a_mixture_is_that_of_whole_answers() -> None:
    """Token by token it gives what the sum over readings of whole answers gives."""
    torch.manual_seed(0)
    logits, weights = torch.randn(5, 4, 7), torch.randn(5)
    said = torch.tensor([[1, 2, 3, 4], [6, 5, 0, 2]])
    mixture, found = Mixture([0, 0, 0, 1, 1], weights), torch.zeros(2)
    for step in range(4):
        logs = mixture(logits[:, step]).log_softmax(-1)
        found += logs.gather(-1, said[:, step, None])[:, 0]
        mixture.tell(logits[:, step : step + 1], said[:, step : step + 1])
    logs = logits.log_softmax(-1)
    for answer, rows in enumerate((range(3), range(3, 5))):
        own = torch.stack([logs[r].gather(-1, said[answer, :, None]).sum() for r in rows])
        prior = weights[list(rows)].log_softmax(0)
        assert float(found[answer]) == pytest.approx(float((prior + own).logsumexp(0)), abs=1e-5)


def test_several_tokens_at_once_are_told_as_one_by_one() -> None:
    torch.manual_seed(0)
    logits, said = torch.randn(3, 4, 7), torch.tensor([[1, 2, 3, 4]])
    at_once, one_by_one = (Mixture([0, 0, 0], torch.zeros(3)) for _ in range(2))
    at_once.tell(logits, said)
    for step in range(4):
        one_by_one.tell(logits[:, step : step + 1], said[:, step : step + 1])
    torch.testing.assert_close(at_once.log_weights, one_by_one.log_weights)


def test_one_row_each_changes_nothing() -> None:
    logits = torch.randn(3, 7)
    assert Mixture.of_one_each(3, logits.device)(logits) is logits


def written(backbone: Backbone, texts: list[Local], mixture: Mixture | None) -> list[list[int]]:
    context = Context([backbone.prefix(texts[0].ids[:0])] * len(texts), None)
    opened = backbone.open(context, texts, mixture=mixture)
    count = len(opened.mixture.sizes)
    answers: list[list[int]] = [[] for _ in range(count)]
    for step in backbone.go_on(opened, [Sampling(max_tokens=6)] * count):
        for answer, token in zip(answers, step, strict=True):
            answer += [] if token is None else [token]
    return answers


def test_decoding_follows_the_mixture(backbone: Backbone) -> None:
    """Greedy tokens of two readings are the best of the weighed mean at every step; an answer of
    one reading in the same batch is what it is alone."""
    texts = [Local.after(backbone.tokenize(t), 0, 0) for t in ("The journal", "A file is", "SQL")]
    weights = torch.tensor([0.2, -0.3, 0.0])
    together, alone = written(backbone, texts, Mixture([0, 0, 1], weights))
    assert [alone] == written(backbone, texts[2:], None)

    prior = weights[:2].log_softmax(0)
    for step, token in enumerate(together):
        logs = []
        for text in texts[:2]:
            ids = torch.cat((text.ids, torch.tensor(together[:step], dtype=torch.long)))
            with torch.no_grad():
                logs.append(backbone.model(ids[None]).logits[0].log_softmax(-1))
        past = [
            sum(float(log[len(text.ids) - 1 + i, t]) for i, t in enumerate(together[:step]))
            for log, text in zip(logs, texts, strict=False)
        ]
        own = torch.stack([log[-1] for log in logs])
        mixed = (own + (prior + torch.tensor(past))[:, None]).logsumexp(0)
        assert int(mixed.argmax()) == token
