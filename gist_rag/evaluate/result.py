"""What ``evaluate`` has found out: predictions, and figures made of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gist_rag.backbone import Backbone
from gist_rag.errors import BadInput
from gist_rag.evaluate import metrics
from gist_rag.evaluate.config import EvaluateConfig
from gist_rag.evaluate.environment import ENVIRONMENT, environment
from gist_rag.evaluate.tasks import Example
from gist_rag.prompt import rag_messages
from gist_rag.reader import Reader

_OWN = {"arms", "limit", "dtype"}
COMPARABLE = (
    *(set(EvaluateConfig.model_fields) - _OWN),
    *("prompt", "model_fingerprint", "reader_fingerprint", "compressors", "questions"),
)
"""What two runs must have in common for their predictions to stand in one result; of compressors
those that both have."""
ORIGIN = ("limit", "dtype", *ENVIRONMENT)
"""What a result says of each earlier run that it goes on with."""


class Result:
    """Predictions by question and arm, those of an earlier run among them.

    Raises:
        BadInput: the earlier run differs in more than arms and number of questions, or a question
            comes twice.
    """

    def __init__(
        self,
        meta: Mapping[str, Any],
        arms: Sequence[str],
        ids: Sequence[str],
        before: Mapping[str, Any] | None,
    ) -> None:
        if len(set(ids)) < len(ids):
            raise BadInput(f"question {Counter(ids).most_common(1)[0][0]!r} comes twice")
        self._meta, self._arms, self._ids = dict(meta), arms, ids
        self._predictions: dict[tuple[str, str], dict[str, Any]] = {}
        if before:
            old = {**EvaluateConfig().model_dump(mode="json"), **before["meta"]}
            if differing := [k for k in sorted(COMPARABLE) if not _agree(meta, old, k)]:
                if len(differing) > 1 and "questions" in differing:
                    differing.remove("questions")  # for they follow from the others
                told = ", ".join(f"{k} {old.get(k)!r}, not {meta.get(k)!r}" for k in differing)
                raise BadInput(f"the result to go on with has {told}")
            self._meta["compressors"] = old.get("compressors", {}) | meta["compressors"]
            self.add(before["predictions"])
            if lost := {id for id, _ in self._predictions} - set(ids):
                raise BadInput(
                    f"the result to go on with has {len(lost)} questions that the task has not"
                )
            origin = {k: old[k] for k in ORIGIN if k in old}
            self._meta["before"] = [*old.get("before", ()), origin]

    def missing(self, id: str) -> list[str]:
        """Arms in which a question has not been asked yet."""
        return [arm for arm in self._arms if (id, arm) not in self._predictions]

    def add(self, predictions: Sequence[dict[str, Any]]) -> None:
        self._predictions |= {(p["id"], p["arm"]): p for p in predictions}

    def written(self) -> dict[str, Any]:
        """The result so far; its figures are those of questions that all arms have answered."""
        whole = {id for id in self._ids if not self.missing(id)}
        kept = [
            self._predictions[id, arm]
            for id in self._ids
            for arm in self._arms
            if (id, arm) in self._predictions
        ]
        figures = summarise([p for p in kept if p["id"] in whole])
        return {"meta": self._meta, "arms": figures, "predictions": kept}


def check_result(result: object) -> dict[str, Any]:
    """What an earlier run has written.

    Raises:
        BadInput: it is something else.
    """
    match result:
        case {"meta": dict(), "predictions": [*predictions]} if all(
            isinstance(p, dict) and p.keys() >= {"id", "arm", "nll"} for p in predictions
        ):
            assert isinstance(result, dict)
            return result
    raise BadInput("no result of evaluate")


def _agree(new: Mapping[str, Any], old: Mapping[str, Any], name: str) -> bool:
    """Whether two runs agree in something; older results do not say everything."""
    if name not in old:
        return True
    if name == "compressors":
        return all(old[name].get(k, v) == v for k, v in new[name].items())
    return bool(new.get(name) == old[name])


def summarise(predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and shares of the context's benefit per arm."""
    arms: dict[str, dict[str, metrics.Scores]] = {}
    for name in dict.fromkeys(p["arm"] for p in predictions):
        rows = [p for p in predictions if p["arm"] == name]
        arms[name] = {
            field: np.array([row[field] for row in rows], dtype=np.float64)
            for field in ("nll", "choice", "em", "contains", "f1", "kv_slots", "source_tokens")
        }
    return {
        name: {
            **_figures(scores, arms["closed"], arms["full"]),
            **_further([p.get("scores", {}) for p in predictions if p["arm"] == name]),
        }
        for name, scores in arms.items()
    }


def _further(scores: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """``{"scores": ...}``: the mean of each further score over the questions that have it."""
    names = dict.fromkeys(name for row in scores for name in row)
    means = {name: float(np.mean([row[name] for row in scores if name in row])) for name in names}
    return {"scores": {name: round(mean, 4) for name, mean in means.items()}} if means else {}


_FieldScores = dict[str, metrics.Scores]


def _figures(arm: _FieldScores, closed: _FieldScores, full: _FieldScores) -> dict[str, Any]:
    """Means of one arm, and the shares of the context's benefit that it keeps."""

    def kept(field: str) -> float:
        return round(metrics.kept(arm[field], closed[field], full[field]), 4)

    low, high = metrics.bootstrap(arm["nll"], closed["nll"], full["nll"])
    return {
        "n": len(arm["nll"]),
        **{field: round(float(values.mean()), 4) for field, values in arm.items()},
        "m_norm": kept("nll"),
        "m_norm_low": round(low, 4),
        "m_norm_high": round(high, 4),
        "m_norm_choice": kept("choice"),
        "m_norm_f1": kept("f1"),
    }


def describe(
    config: EvaluateConfig,
    questions: Sequence[Example],
    backbone: Backbone,
    reader: Reader | None,
    compressors: Mapping[str, str],
) -> dict[str, Any]:
    """What a result says of its run.

    ``questions`` is a digest of the first one, which stays when more are asked; of a probe, whose
    questions depend on how many there are, one of all. ``compressors`` are their fingerprints.
    """
    told = [repr(question) for question in (questions if config.probe else questions[:1])]
    return {
        **json.loads(config.model_dump_json()),
        "task": config.task.name if config.task else None,
        "questions": hashlib.sha256("".join(told).encode()).hexdigest(),
        "model_fingerprint": backbone.fingerprint,
        "reader_fingerprint": reader.fingerprint if reader else None,
        "compressors": dict(compressors),
        "prompt": rag_messages("{question}", ["{passages}"]),
        **environment(),
    }
