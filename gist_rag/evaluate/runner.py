"""``evaluate``: the same questions through every arm, scored in three ways that must agree.

Scores are the gold answer's NLL per token, the share of questions whose gold answer is likelier per
token than nine others (``choice``), and what a greedy answer contains; a probe adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import compose
from gist_rag.errors import BadInput
from gist_rag.evaluate import metrics
from gist_rag.evaluate.arms import Arms, Reading
from gist_rag.evaluate.config import EvaluateConfig
from gist_rag.evaluate.probes import make_probe
from gist_rag.evaluate.result import Result, check_result, describe
from gist_rag.evaluate.tasks import Example, Task, load_task
from gist_rag.mixture import Mixture
from gist_rag.reader import Reader, load_backbone

GROUP = 16
"""Questions whose answers are generated together."""

Progress = Callable[[int, int], None]


def evaluate(
    config: EvaluateConfig,
    progress: Progress | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run all arms.

    Args:
        progress: called after each group of questions with questions done and questions in all.
        keep: called after each group with the result so far, so that a run that is stopped has
            not been for nothing.
        before: the result of an earlier run, perhaps of fewer questions, of other arms or in
            another dtype. What it holds is not asked again, and is part of this result.

    Returns:
        ``{"meta", "arms", "predictions"}`` as written by ``gist-rag evaluate``.

    Raises:
        BadInput: an unusable task or arm, or a ``before`` of other settings or questions.
    """
    if before is not None:
        config = config.joined(check_result(before))
    task = _task(config)
    examples = task.examples
    backbone, reader = load_backbone(config.model, config.reader, dtype=config.dtype)
    arms = Arms(backbone, config, reader)
    meta = describe(config, examples, backbone, reader, arms.fingerprints)
    result = Result(meta, config.all_arms, [e.id for e in examples], before)
    for first in range(0, len(examples), GROUP):
        group = examples[first : first + GROUP]
        with torch.no_grad():
            missing = {e.id: result.missing(e.id) for e in group}
            readings = {e.id: arms.readings(e, missing[e.id]) for e in group if missing[e.id]}
            for arm in config.all_arms:
                if asked := [e for e in group if arm in missing[e.id]]:
                    chosen = [readings[e.id][arm] for e in asked]
                    result.add(predict(backbone, arm, task, asked, chosen, reader))
        if keep and readings:
            keep(result.written())
        if progress:
            progress(first + len(group), len(examples))
    return result.written()


def _task(config: EvaluateConfig) -> Task:
    """The questions that a config asks for."""
    chosen: dict[str, int] = {
        "num_passages": config.passages, "limit": config.limit, "seed": config.seed
    }  # fmt: skip
    if config.probe is not None:
        return make_probe(config.probe, file=config.task, **chosen)
    if config.task is None:
        raise BadInput("neither a task nor a probe; give one of them")
    return Task(load_task(config.task, **chosen))


def predict(
    backbone: Backbone,
    arm: str,
    task: Task,
    examples: Sequence[Example],
    readings: Sequence[Sequence[Reading]],
    reader: Reader | None,
) -> list[dict[str, Any]]:
    """Scores and greedy answers of a group of questions in one arm."""
    rows = [row for reading in readings for row in reading]
    owner = [i for i, reading in enumerate(readings) for _ in reading]
    weights = torch.tensor([row.log_weight for row in rows], device=backbone.device)
    context = Context([r.prefix for r in rows], compose([r.placed for r in rows], backbone))
    opened = backbone.open(context, [r.text for r in rows], reader, Mixture(owner, weights))
    doubts = opened.entropy.tolist()
    answers = backbone.write(opened, task.new_tokens)
    out = []
    for example, reading, answer, doubt in zip(examples, readings, answers, doubts, strict=True):
        losses = answer_losses(backbone, reading, (example.answers[0], *example.choices), reader)
        out.append(
            {
                "id": example.id,
                "arm": arm,
                "answer": answer,
                "doubt": round(doubt, 4),
                "gold": example.answers[0],
                "nll": losses[0],
                "choice": float(losses[0] < min(losses[1:], default=float("inf"))),
                "em": metrics.exact_match(answer, example.answers),
                "contains": metrics.contains(answer, example.answers),
                "f1": metrics.f1(answer, example.answers),
                "kv_slots": sum(row.kv_slots for row in reading),
                "source_tokens": reading[0].source_tokens,
                **({"scores": dict(scores)} if (scores := task.score(example, answer)) else {}),
            }
        )
    return out


def answer_losses(
    backbone: Backbone,
    readings: Sequence[Reading],
    answers: Sequence[str],
    reader: Reader | None = None,
) -> list[float]:
    """NLL per token of several answers, under the readings' mixture (``gist_rag.mixture``)."""
    ends = torch.tensor([min(backbone.stop_ids)])
    targets = [torch.cat((backbone.tokenize(a), ends)) for a in answers]
    said = torch.stack([_log_probs(backbone, r, targets, reader) for r in readings])  # (R, A)
    weights = torch.tensor([r.log_weight for r in readings]).log_softmax(0)
    lengths = torch.tensor([len(t) for t in targets])
    losses: list[float] = (-(said + weights[:, None]).logsumexp(0) / lengths).tolist()
    return losses


def _log_probs(
    backbone: Backbone, reading: Reading, branches: Sequence[Tensor], reader: Reader | None
) -> Tensor:
    """``(A,)`` of several answers, read in one pass as branches behind the same question.

    A branch's tokens see the question and their own branch; its positions go on from the question.
    """
    question, fed = reading.text, [b[:-1] for b in branches]
    start = int(question.positions[-1]) + 1
    seen = len(reading.placed)
    local = Local.join([question, *(Local.after(b, start, seen) for b in fed)])

    width, size = len(reading.prefix), len(local.ids)
    branch = torch.cat([torch.full((len(b),), i) for i, b in enumerate((question.ids, *fed))])
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    visible = causal & ((branch[None] == 0) | (branch[:, None] == branch[None]))
    mask = torch.cat((torch.ones(size, width, dtype=torch.bool), visible), dim=1)

    context = Context([reading.prefix], compose([reading.placed], backbone))
    logits = backbone.read(context, [local], mask=mask[None, None], adapter=reader)[0]
    logits = logits.float().log_softmax(-1)
    sums, at = [], len(question.ids)
    for target in branches:
        rows = torch.cat(
            (torch.tensor([len(question.ids) - 1]), at + torch.arange(len(target) - 1))
        )
        sums.append(logits[rows, target.to(logits.device)].sum())
        at += len(target) - 1
    return torch.stack(sums).cpu()
