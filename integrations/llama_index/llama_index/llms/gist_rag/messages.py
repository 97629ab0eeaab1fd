"""Between LlamaIndex's messages, with their blocks, and the text that a model reads and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from llama_index.core.base.llms.types import (
    ChatMessage,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json

from gist_rag.errors import BadInput

if TYPE_CHECKING:  # this imports torch
    from gist_rag.tools import CallReader, Piece, ToolFormat

WriteCall = Callable[[str, Mapping[str, Any]], str]

_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}


def to_role(message: ChatMessage) -> str:
    """The role under which chat templates know it."""
    return _ROLES.get(message.role, message.role.value)


def text_of(message: ChatMessage, write_call: WriteCall | None = None) -> str:
    """The text of a message.

    Args:
        write_call: how tool calls are written; without it they are left out.

    Raises:
        BadInput: a block that is no text.
    """
    pieces = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            pieces.append(block.text)
        elif isinstance(block, ToolCallBlock):
            if write_call is not None:
                pieces.append(write_call(block.tool_name, _arguments(block.tool_kwargs)))
        elif not isinstance(block, ThinkingBlock):
            raise BadInput(f"GistLLM reads text only, got a block of type {block.block_type!r}")
    return "\n".join(pieces)


def tool_calls_in(message: ChatMessage) -> list[ToolSelection]:
    """The tool calls of an answer, whole or still being written."""
    return [
        ToolSelection(
            tool_id=block.tool_call_id or "",
            tool_name=block.tool_name,
            tool_kwargs=_arguments(block.tool_kwargs),
        )
        for block in message.blocks
        if isinstance(block, ToolCallBlock)
    ]


class AnswerReader:
    """Reads text and tool calls out of an answer while it is being written.

    Args:
        tool_format: how calls are written; ``None`` if there are none to look for.
    """

    def __init__(self, tool_format: ToolFormat | None) -> None:
        self._reader = None if tool_format is None else _reader(tool_format)
        self._calls: dict[int, ToolCallBlock] = {}
        self.text = ""

    def push(self, text: str) -> str:
        """Take another bit of the answer; what it adds to the text outside of calls."""
        if self._reader is None:
            self.text += text
            return text
        return self._take(self._reader.push(text))

    def close(self) -> str:
        """The answer has ended; what that adds to its text."""
        return "" if self._reader is None else self._take(self._reader.close())

    def message(self) -> ChatMessage:
        """The answer so far. Arguments are JSON text until they are whole."""
        calls = [block.model_copy() for block in self._calls.values()]
        text = [TextBlock(text=self.text)] if self.text or not calls else []
        legacy = [
            {
                "id": call.tool_call_id,
                "type": "function",
                "function": {"name": call.tool_name, "arguments": call.tool_kwargs},
            }
            for call in calls
        ]
        return ChatMessage(
            role=MessageRole.ASSISTANT,
            blocks=[*text, *calls],
            # LlamaIndex's own programs look here whether there are calls while they stream.
            additional_kwargs={"tool_calls": legacy} if legacy else {},
        )

    def _take(self, pieces: list[Piece]) -> str:
        before = len(self.text)
        for piece in pieces:
            if piece.call is None:
                self.text += piece.text
            elif piece.call in self._calls:
                block = self._calls[piece.call]
                block.tool_kwargs = f"{block.tool_kwargs}{piece.arguments}"
            elif piece.name is not None:
                self._calls[piece.call] = ToolCallBlock(
                    tool_call_id=f"call_{uuid4().hex}",
                    tool_name=piece.name,
                    tool_kwargs=piece.arguments,
                )
            else:  # a call that cannot be read is left to the user to see
                self.text += piece.arguments
        return self.text[before:]


def _reader(tool_format: ToolFormat) -> CallReader:
    from gist_rag.tools import CallReader

    return CallReader(tool_format)


def _arguments(written: str | dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, as many as can be read."""
    if isinstance(written, dict):
        return written
    try:
        found = json.loads(written)
    except ValueError:
        try:
            found = parse_partial_json(written)
        except ValueError:
            found = {}
    return found if isinstance(found, dict) else {}
