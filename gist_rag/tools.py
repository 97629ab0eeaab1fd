"""Tool calls as text: how tools are offered to a model, how it writes calls, how they are read.

Tools are dictionaries in OpenAI's format. A template that knows tools shows them in its own way;
for one that does not, they are described in the system message. Calls come back as text, in one of
two formats: between ``<tool_call>`` tags (Hermes, Qwen, SmolLM), or as bare JSON (Llama 3).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from gist_rag.constrain import Constraint, json_rule, text_rule
from gist_rag.errors import BadInput
from gist_rag.types import Message

Tool: TypeAlias = Mapping[str, Any]
"""``{"type": "function", "function": {"name": ..., "description": ..., "parameters": schema}}``"""

ToolChoice: TypeAlias = Literal["auto", "required"] | Mapping[str, str]
"""``auto``: calls or text; ``required``: at least one call; ``{"name": ...}``: one of that tool."""

OFFER = """\
# Tools

You may call functions to help with the user's request. These are the functions:
<tools>
{tools}
</tools>

To call a function, answer with its name and arguments as JSON, in this form:
{form}"""
JSON_ONLY = "Answer with JSON only, that conforms to this JSON schema:\n{schema}"


@dataclass(frozen=True)
class Piece:
    """What some generated text adds to an answer: text, or a part of a tool call.

    Attributes:
        text: plain text.
        call: which call of the answer, from 0; ``None`` for plain text.
        name: of the tool, in the first piece of its call; ``None`` there if it cannot be read.
        arguments: JSON text, to be joined with that of the other pieces of the call.
    """

    text: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        opening, closing: what stands around a call; empty for bare JSON.
        arguments: the key of a call's arguments.
    """

    opening: str
    closing: str
    arguments: str

    def write(self, name: str, arguments: Mapping[str, Any]) -> str:
        """A call as the model would write it."""
        call = json.dumps({"name": name, self.arguments: arguments}, ensure_ascii=False)
        return f"{self._before}{call}{self._after}"

    def offer(self, tools: Sequence[Tool]) -> str:
        """A description of tools for a template that knows none."""
        form = f'{self._before}{{"name": NAME, "{self.arguments}": ARGUMENTS}}{self._after}'
        written = [json.dumps(_function(tool), ensure_ascii=False) for tool in tools]
        return OFFER.format(tools="\n".join(written), form=form)

    def constrain(
        self,
        tools: Sequence[Tool],
        choice: ToolChoice = "auto",
        *,
        parallel: bool = False,
        schema: Mapping[str, Any] | None = None,
        max_chars: int | None = None,
    ) -> Constraint:
        """Answers that call these tools with arguments that their schemas allow.

        Args:
            parallel: whether one answer may hold several calls.
            schema: of an answer in which nothing is called; default any text.
            max_chars: as in ``Constraint.json``.

        Raises:
            BadInput: a choice that names no tool.
        """
        if not isinstance(choice, str):
            tools = [tool for tool in tools if _function(tool)["name"] == choice["name"]]
            if not tools:
                raise BadInput(f"tool_choice names {choice['name']!r}, which is no bound tool")
        several = parallel and isinstance(choice, str) and bool(self.opening)
        more = f" ({text_rule(chr(10) + self.opening)} call)*" if several else ""
        rules = [
            f"call: {text_rule(self._before.removeprefix(self.opening) + '{' + _NAME)}"
            f" ({' | '.join(f'tool_{i}' for i in range(len(tools)))})"
            f" {text_rule('}' + self._after)}"
        ]
        for i, tool in enumerate(tools):
            function = _function(tool)
            head = f'{json.dumps(function["name"])}, "{self.arguments}": '
            rules.append(
                f"tool_{i}: {text_rule(head)} " + json_rule(_parameters(function), max_chars)
            )
        call = f"{text_rule(self.opening) if self.opening else ''} call{more}"
        if choice != "auto":
            rules.append(f"start: {call}")
        elif schema is not None:
            rules.append(f"start: {json_rule(schema, max_chars)} | {call}")
        elif self.opening:  # a lazy head ends at the first opening tag, so that text has none
            rules.append(f"start: TEXT | head call{more}")
            rules += [f"head[lazy]: TEXT {text_rule(self.opening)}", "TEXT: /(.|\\n)*/"]
        else:
            rules += ["start: TEXT | call", "TEXT: /[^{](.|\\n)*/"]
        return Constraint("\n".join(rules))

    @property
    def _before(self) -> str:
        return f"{self.opening}\n" if self.opening else ""

    @property
    def _after(self) -> str:
        return f"\n{self.closing}" if self.closing else ""


TAGGED = ToolFormat("<tool_call>", "</tool_call>", "arguments")
BARE = ToolFormat("", "", "parameters")
_NAME = '"name": '


def tool_format(template: str | None) -> ToolFormat:
    """The format that a chat template asks for; ``TAGGED`` where it asks for none."""
    bare = template is not None and TAGGED.opening not in template and '"parameters": ' in template
    return BARE if bare else TAGGED


def with_instruction(messages: Sequence[Message], instruction: str) -> list[Message]:
    """Messages with something added to the system message, or with one that says it."""
    if messages and messages[0]["role"] == "system":
        both = f"{messages[0]['content']}\n\n{instruction}"
        return [{"role": "system", "content": both}, *messages[1:]]
    return [{"role": "system", "content": instruction}, *messages]


class CallReader:
    """Reads tool calls out of an answer while it is being written.

    Text that may yet turn out to be a call is held back until it is clear. A call whose JSON is
    broken comes out as one piece without a name.
    """

    def __init__(self, format: ToolFormat) -> None:
        self._format = format
        self._held = ""
        self._inside = False
        self._arguments: _ObjectEnd | None = None
        self._calls = 0

    def push(self, text: str) -> list[Piece]:
        """What another bit of the answer adds."""
        self._held += text
        return list(self._read(ended=False))

    def close(self) -> list[Piece]:
        """What is left when the answer has ended, perhaps in the middle of a call."""
        return list(self._read(ended=True))

    def _read(self, ended: bool) -> Iterator[Piece]:
        if not self._format.opening:
            yield from self._read_bare(ended)
            return
        while True:
            if not self._inside:
                yield from self._read_text(ended)
                if not self._inside:
                    return
            elif self._arguments is None and (head := _HEAD.match(self._held)):
                self._held = self._held[head.end() :]
                self._arguments = _ObjectEnd()
                yield Piece(call=self._calls, name=json.loads(head[1]))
            elif self._arguments is not None and not self._arguments.reached and self._held:
                inside = self._arguments.scan(self._held)
                yield Piece(call=self._calls, arguments=self._held[:inside])
                self._held = self._held[inside:]
            else:
                body, closed, rest = self._held.partition(self._format.closing)
                if not (closed or ended):
                    return
                if self._arguments is None:
                    yield from self._whole_call(body)
                else:
                    self._calls += 1
                self._held, self._inside, self._arguments = rest, False, None

    def _read_text(self, ended: bool) -> Iterator[Piece]:
        """Text up to the next call; the whitespace around calls is left out."""
        text, opening, rest = self._held.partition(self._format.opening)
        if opening:
            self._held, self._inside = rest, True
            text = text.rstrip()
        else:
            certain = len(text)
            if not ended:
                certain -= _overlap(text, self._format.opening)
                certain = len(text[:certain].rstrip())
            text, self._held = text[:certain], text[certain:]
        if self._calls:
            text = text if text.strip() else ""
        if text:
            yield Piece(text)

    def _read_bare(self, ended: bool) -> Iterator[Piece]:
        if self._held.lstrip().startswith("{") or not self._held.strip():
            if not ended:
                return
            if calls := _calls_in(self._held):
                for name, arguments in calls:
                    yield Piece(call=self._calls, name=name, arguments=arguments)
                    self._calls += 1
                self._held = ""
        if self._held:
            yield Piece(self._held)
            self._held = ""

    def _whole_call(self, body: str) -> Iterator[Piece]:
        """The calls of a body that did not begin as expected."""
        calls: Sequence[tuple[str | None, str]] = _calls_in(body) or [(None, body.strip())]
        for name, arguments in calls:
            yield Piece(call=self._calls, name=name, arguments=arguments)
            self._calls += 1


class _ObjectEnd:
    """Finds the end of a JSON object that comes in bits."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.reached = False

    def scan(self, text: str) -> int:
        """How much of the text belongs to the object."""
        for at, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = letter == "\\"
                self._quoted = letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.reached = True
                    return at + 1
        return len(text)


_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


def _calls_in(body: str) -> list[tuple[str, str]]:
    """Names and arguments of the calls in a piece of JSON; none if it holds anything else."""
    try:
        found = json.loads(body)
    except ValueError:
        return []
    calls = []
    for call in found if isinstance(found, list) else [found]:
        arguments = _arguments(call) if isinstance(call, dict) else None
        if arguments is None:
            return []
        calls.append((call["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls


def _arguments(call: Mapping[str, Any]) -> Mapping[str, Any] | None:
    arguments = call.get("arguments", call.get("parameters", {}))
    named = isinstance(call.get("name"), str)
    return arguments if named and isinstance(arguments, dict) else None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of a text with which a tag begins."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)


def _function(tool: Tool) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments."""
    return {"type": "object", "properties": {}, **(function.get("parameters") or {})}
