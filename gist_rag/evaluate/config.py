"""What ``evaluate`` is asked to run, and what its arms mean.

Arms are ``closed`` (no passages), ``full`` (text), ``truncated`` (text cut to the same number of
slots), ``reuse`` (uncompressed gists) and compressors, each ``name`` or ``name@ratio``; or
``name@8-16-32/16x``, compressed at several ratios and read within a budget (``gist_rag.budget``).
Behind it may stand what is done with the ``n`` passages that matter most (``gist_rag.focus``):
``:n`` reads them alone of all, ``~n`` reads each of them apart, ``^n`` does so and reads all
together besides; ``*`` instead reads all together, each with its weight; and last, ``+n`` has them
as text, of passages read apart where they stand alone. Who judges what matters is the config's
``judge``. Each prediction says in what ``doubt`` it was made, so that a threshold can be found
afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from gist_rag.budget import Budget
from gist_rag.compose import DEFAULT_POSITIONS, Positions
from gist_rag.compressors import COMPRESSORS, DEFAULT_COMPRESSOR
from gist_rag.errors import BadInput
from gist_rag.focus import TOGETHER, Focus
from gist_rag.likeness import LIKELIHOOD
from gist_rag.models import DEFAULT_RAG_MODEL

TEXT_ARMS = ("closed", "full", "truncated")
UNTRAINED = {*TEXT_ARMS, "reuse", *COMPRESSORS}
"""Arms that have no ratio of their own."""
Gists: TypeAlias = tuple[str, tuple[float, ...]]
"""A compressor's name and its ratios."""


class EvaluateConfig(BaseModel):
    """What to run; written into the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Path | None = None
    probe: str | None = None
    compressor: str = DEFAULT_COMPRESSOR
    ratio: float = Field(default=8.0, ge=1)
    passages: int = Field(default=1, ge=1)
    limit: int = Field(default=100, ge=1)
    seed: int = 0
    model: str = DEFAULT_RAG_MODEL
    reader: str | None = None
    judge: str = LIKELIHOOD
    codec: str | None = None
    dtype: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    arms: tuple[str, ...] = ()
    positions: Positions = DEFAULT_POSITIONS

    @property
    def all_arms(self) -> tuple[str, ...]:
        """The arms asked for, with the two references that every number is set against."""
        chosen = self.arms or ("truncated", "reuse", "strided", self.compressor)
        return tuple(dict.fromkeys(("closed", "full", *chosen)))

    def joined(self, before: Mapping[str, Any]) -> Self:
        """With the questions and arms of an earlier result besides its own; with those alone, if
        it names none."""
        earlier = before["predictions"]
        arms = dict.fromkeys((*(self.all_arms if self.arms else ()), *(p["arm"] for p in earlier)))
        limit = max(self.limit, len({p["id"] for p in earlier}))
        return self.model_copy(update={"limit": limit, "arms": tuple(arms)})


@dataclass(frozen=True)
class Arm:
    """``name@ratio``, or of several ``ratios`` with the ``budget`` that chooses among them; perhaps
    ``how`` the ``many`` passages that matter most are read, and of how many the text is read
    (``expanded``). No ``ratios``: its own."""

    name: str
    ratios: tuple[float, ...]
    how: str = ""
    many: int = 0
    expanded: int = 0
    budget: Budget | None = None

    @classmethod
    def parse(cls, text: str, ratio: float) -> Self:
        """From its text, with the ratio of those that name none; trained compressors then have
        their own.

        Raises:
            BadInput: no ratio, or no number of passages, where there should be one; passages to be
                chosen from those of an arm that reads no gists; or a budget for passages that do
                not share a context.
        """
        form = r"(.*?)(?:@([^@/]*?)(?:/([\w.]+))?)?(?:([:~^])(\d+)|(\*))?(?:\+(\d+))?"
        found = re.fullmatch(form, text, re.S)
        assert found is not None
        name, given, budget, how, many, weigh, expanded = found.groups("")
        try:
            ratios = [float(r) for r in given.split("-")] if given else []
        except ValueError as error:
            raise BadInput(
                f"arm {text!r} is not name, name@ratio or name@ratio-ratio/budget, perhaps with "
                ":n, ~n, ^n or * behind it, and then with +n"
            ) from error
        if many == "0":
            raise BadInput(f"arm {text!r} reads 0 passages; give 1 or more")
        arm = cls(
            name,
            tuple(ratios) or ((ratio,) if name in UNTRAINED else ()),
            how or weigh,
            int(many or 0),
            int(expanded or 0),
            Budget.parse(budget) if budget else None,
        )
        if arm.chooses and name in TEXT_ARMS:
            raise BadInput(f"arm {text!r}: {name} reads no gists to choose from")
        if arm.budget and arm.focus:
            raise BadInput(f"arm {text!r}: a budget is of passages that are all read together")
        return arm

    @property
    def chooses(self) -> bool:
        """Whether it asks which passages matter."""
        return bool(self.how or self.expanded or self.budget)

    @property
    def focus(self) -> Focus | None:
        """What it reads of its passages; ``None`` for all, together."""
        if self.how in ("", "*"):
            return None
        together = TOGETHER if self.how == "^" else 0.0
        return Focus(self.many, apart=self.how != ":", together=together)

    @property
    def weighs(self) -> bool:
        """Whether passages have weights of their own."""
        return self.how == "*"

    @property
    def gists(self) -> Gists:
        """Which gists it reads, some or all of them."""
        return self.name, self.ratios
