"""Answers that must have a form: JSON of a schema, a regular expression, one of some choices.

A ``Constraint`` is a grammar as text. ``Grammars`` compiles it once per tokenizer, with llguidance,
and gives each answer a ``Follower`` of its own, which says before every token what may come next.
An end token is among that only where the grammar is satisfied.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from gist_rag.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COMPILED = 128
"""Grammars that are remembered per tokenizer."""
_JSON = {
    # As models write JSON by themselves: one line, and letters of all scripts as they are.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
    "lenient": True,  # keywords that cannot be enforced are left to whoever validates the answer
}

_BOUNDS = {"maxLength", "pattern", "format", "enum", "const"}
"""Keywords that say how long a string can be."""
_OTHER_KEYS = {"additionalProperties", "patternProperties", "unevaluatedProperties", "allOf"}
"""Keywords that say, or may say, what keys an object has besides ``properties``."""
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords that hold schemas by name."""
_DATA = {"enum", "const", "default", "examples", "required"}
"""Keywords that hold data, which is no schema."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like.

    Attributes:
        grammar: in llguidance's dialect of Lark; ``start`` is the whole answer.
    """

    grammar: str

    @classmethod
    def json(cls, schema: Mapping[str, Any] | None = None, *, max_chars: int | None = None) -> Self:
        """JSON that a schema allows; without one, any JSON object.

        Objects have no keys that the schema does not name, unless it says that they may.

        Args:
            max_chars: of all strings together whose length the schema leaves open. Small models
                lose themselves in long strings, and JSON that is cut off is none.
        """
        return cls(f"start: {json_rule(schema, max_chars)}")

    @classmethod
    def regex(cls, pattern: str) -> Self:
        """Text that a regular expression matches as a whole (without look-around or groups)."""
        return cls("start: TEXT\nTEXT: " + "/" + pattern.replace("/", r"\/") + "/")

    @classmethod
    def choices(cls, options: Sequence[str]) -> Self:
        """One of some texts.

        Raises:
            BadInput: none are given.
        """
        if not options:
            raise BadInput("an answer cannot be one of no choices")
        return cls("start: " + " | ".join(text_rule(option) for option in options))


def is_available() -> bool:
    """Whether constraints can be followed here: whether llguidance is installed."""
    return find_spec("llguidance") is not None


def json_rule(schema: Mapping[str, Any] | None = None, max_chars: int | None = None) -> str:
    """The part of a grammar that stands for JSON of a schema."""
    described: Any = {"type": "object"} if schema is None else schema
    count = sum(_is_open_string(part) for part in _parts(described))
    longest = None if max_chars is None else max(1, max_chars // max(1, count))
    return "%json " + json.dumps({**_narrowed(described, longest), "x-guidance": _JSON})


def text_rule(text: str) -> str:
    """The part of a grammar that stands for a text."""
    return json.dumps(text, ensure_ascii=False)


def _parts(schema: Any) -> Iterator[Any]:
    """A schema and all schemas in it."""
    if isinstance(schema, list):
        for part in schema:
            yield from _parts(part)
    if isinstance(schema, Mapping):
        yield schema
        for key, value in schema.items():
            named = key in _NAMED and isinstance(value, Mapping)
            if key not in _DATA:
                yield from _parts(list(value.values()) if named else value)


def _narrowed(schema: Any, max_length: int | None, close: bool = True) -> Any:
    """A schema whose open strings have a greatest length and whose objects have no other keys than
    those they name, where they do not say otherwise."""
    if isinstance(schema, list):
        return [_narrowed(part, max_length, close) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    inner: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, Mapping):
            inner[key] = {name: _narrowed(part, max_length) for name, part in value.items()}
        elif key in _DATA:
            inner[key] = value
        else:  # the parts of an allOf each name some keys of the same object
            inner[key] = _narrowed(value, max_length, close=key != "allOf")
    if max_length is not None and _is_open_string(schema):
        inner["maxLength"] = max_length
    if close and "properties" in schema and not schema.keys() & _OTHER_KEYS:
        inner["additionalProperties"] = False
    return inner


def _is_open_string(schema: Any) -> bool:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    kinds = kind if isinstance(kind, list) else [kind]
    return "string" in kinds and not schema.keys() & _BOUNDS


class Grammars:
    """Constraints, compiled for one tokenizer. Safe to share by threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        stop_ids: tokens that end an answer.

    Raises:
        MissingExtra: llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingExtra("llguidance", "tools") from error
        self._tokenizer = from_tokenizer(tokenizer, eos_token=sorted(stop_ids))
        self._end = min(stop_ids)
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()
        self._lock = threading.Lock()

    def follow(self, constraint: Constraint) -> Follower:
        """A fresh follower of a constraint.

        Raises:
            BadInput: the grammar, schema or pattern is none.
        """
        with self._lock:
            if constraint not in self._compiled:
                self._compiled[constraint] = self._compile(constraint)
                if len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
            self._compiled.move_to_end(constraint)
            return Follower(self._compiled[constraint].deep_copy(), self._end)

    def _compile(self, constraint: Constraint) -> Any:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, constraint.grammar, log_level=0)
        if matcher.is_error():
            raise BadInput(f"answers cannot be constrained so: {matcher.get_error().strip()}")
        return matcher


class Follower:
    """Follows one answer through a grammar.

    Args:
        end: the token that ends an answer.
    """

    def __init__(self, matcher: Any, end: int) -> None:
        self._matcher = matcher
        self._end = end

    def allowed(self, num_tokens: int) -> NDArray[np.bool_]:
        """``(num_tokens,)``: which tokens of the vocabulary may come next."""
        import numpy as np

        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:num_tokens].astype(bool)
        return np.pad(bits, (0, num_tokens - len(bits)))

    def take(self, token: int) -> None:
        """Go on past a token, which must be an allowed one."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise BadInput(f"the grammar gave up: {self._matcher.get_error().strip()}")

    def forced(self) -> list[int]:
        """Tokens that must come next, before there is a choice again. Goes on past them."""
        if self._matcher.is_stopped():
            return []
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if tokens:
            self._matcher.consume_tokens(tokens)
        over = self._matcher.is_stopped() and not self._matcher.is_error()
        return [*tokens, self._end] if over else tokens

    @property
    def satisfied(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())
