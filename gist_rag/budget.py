"""How much of a context its gists may take, and at which ratio each is then read.

A passage that was compressed at several ratios (``GistState.coarser``) can be read at any of them.
So what matters most is read finest, and the rest as coarsely as the budget wants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, get_args

from torch import Tensor

from gist_rag.errors import BadInput
from gist_rag.types import GistState

Unit = Literal["slots", "ratio", "bytes"]

_BYTES = {"KB": 1e3, "MB": 1e6, "GB": 1e9}
_ROUNDING = 1e-6
TOLERANCE = 1.01
"""Of ratios: a passage has a whole number of slots."""
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(x|KB|MB|GB)?\s*")


@dataclass(frozen=True)
class Budget:
    """What all gists of a prompt may take together.

    Attributes:
        amount: of ``unit``.
        unit: ``slots`` of an average head, that is, tokens of a KV cache; ``ratio``, tokens of the
            passages for each such slot (to within ``TOLERANCE``); ``bytes`` as they are stored.
    """

    amount: float
    unit: Unit = "slots"

    def __post_init__(self) -> None:
        if not 1 <= self.amount < math.inf or self.unit not in get_args(Unit):
            raise BadInput(
                f"a budget of {self.amount} {self.unit}; it must be 1 or more slots, bytes or as "
                "a ratio"
            )

    @classmethod
    def parse(cls, text: str | float) -> Self:
        """From ``"400"`` (slots), ``"16x"`` (a ratio) or ``"2.5MB"``.

        Raises:
            BadInput: it is none of these.
        """
        found = _WRITTEN.fullmatch(str(text))
        if not found:
            raise BadInput(f"budget {text!r} is not like 400 (slots), 16x (a ratio) or 2.5MB")
        number, unit = float(found[1]), found[2]
        if unit is None:
            return cls(number)
        return cls(number, "ratio") if unit == "x" else cls(number * _BYTES[unit], "bytes")

    def chosen(
        self,
        states: Sequence[GistState],
        judged: Tensor | None = None,
        times: Sequence[int] | None = None,
    ) -> list[GistState | None]:
        """What is read of each passage: one of its ratios, or nothing.

        All are read at their coarsest; then one after the other, what matters most first, is read
        as finely as what is left allows. If that is too much to begin with, what matters least is
        left out, but never all.

        Args:
            judged: ``(P,)`` how much each matters; default: the first one most.
            times: how often each is read; default: once.
        """
        times = times or [1] * len(states)
        places = [*range(len(states))]
        if judged is not None:
            places = judged.argsort(descending=True, stable=True).tolist()
        coarsest = [[s, *s.coarser][-1] for s in states]
        least = [n * self._cost(s) for n, s in zip(times, coarsest, strict=True)]
        left, read = self._limit(states, times) - sum(least), len(states)
        while left < -_ROUNDING and read > 1:
            read -= 1
            left += least[places[read]]
        chosen: list[GistState | None] = [None] * len(states)
        for place in places[:read]:
            chosen[place], spare = coarsest[place], left + least[place]
            for level in (states[place], *states[place].coarser):
                if (cost := times[place] * self._cost(level)) <= spare + _ROUNDING:
                    chosen[place], left = level, spare - cost
                    break
        return chosen

    def _limit(self, states: Sequence[GistState], times: Sequence[int]) -> float:
        if self.unit != "ratio":
            return self.amount
        tokens = sum(n * s.num_tokens for n, s in zip(times, states, strict=True))
        return TOLERANCE * tokens / self.amount

    def _cost(self, state: GistState) -> float:
        return state.num_bytes if self.unit == "bytes" else state.mean_slots


def make_budget(budget: Budget | str | float | None) -> Budget | None:
    """From a number of slots, or as it is written on a command line."""
    return budget if budget is None or isinstance(budget, Budget) else Budget.parse(budget)
