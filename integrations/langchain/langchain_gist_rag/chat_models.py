"""``ChatGist``: a chat model that reads known passages of its prompts as precompressed gists."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import (
    BaseChatModel,
    LanguageModelInput,
    ModelProfile,
)
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult

from gist_rag.aio import iterate_in_thread, run_in_thread
from gist_rag.errors import BadInput
from langchain_gist_rag._common import PROVIDER, GistModel, LazyEngine

if TYPE_CHECKING:
    from gist_rag import Answer
    from gist_rag.prompt import Segment
    from gist_rag.types import Message


class ChatGist(GistModel, BaseChatModel):
    """A local chat model that reads precompressed gists of known passages.

    Prompts need no markers: a passage that was given to ``precompress`` is recognised by its text,
    wherever a chain puts it in a system, human or tool message.

    Example:
        >>> llm = ChatGist(store="./gists", ratio=8)
        >>> llm.precompress(documents)
        >>> answer = (prompt | llm).invoke({"context": documents[0].page_content, ...})
        >>> answer.response_metadata["gist"]["hits"]
        1

    Messages hold text only. Tools cannot be bound yet, but tool calls and results in a history are
    read.
    """

    streaming: bool = False
    """Stream internally even on ``invoke``, for callbacks that want each token."""
    max_retries: int = 0
    """Accepted because all chat models have it; there is no network to try again."""

    @property
    def _llm_type(self) -> str:
        return "gist-rag-chat"

    def explain(self, input: LanguageModelInput, **options: Any) -> list[Segment]:
        """The prompt split into text and recognised passages, as it would be read.

        Args:
            options: ``gist_mode``.
        """
        prompt = to_prompt(self._convert_input(input).to_messages())
        segments: list[Segment] = self.engine.segments(prompt, **options)
        return segments

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Positions that a conversation takes, recognised passages counted as gists."""
        positions: int = self.engine.count(to_prompt(messages), self.gist_mode, tools)
        return positions

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._answer(messages, stop, kwargs, threading.Event())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await run_in_thread(lambda cancel: self._answer(messages, stop, kwargs, cancel))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        # LangChain itself calls on_llm_new_token for each chunk of a chat model.
        return self._pieces(messages, stop, kwargs, threading.Event())

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for chunk in iterate_in_thread(
            lambda cancel: self._pieces(messages, stop, kwargs, cancel)
        ):
            yield chunk

    def _answer(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: Mapping[str, Any],
        cancel: threading.Event,
    ) -> ChatResult:
        request = self._request(stop, options, cancel)
        with self._deadline(cancel):
            answer = self.engine.generate(to_prompt(messages), **request)
        message = AIMessage(content=answer.text, **self._metadata(answer))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _pieces(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: Mapping[str, Any],
        cancel: threading.Event,
    ) -> Iterator[ChatGenerationChunk]:
        request = self._request(stop, options, cancel)
        with self._deadline(cancel):
            for piece in self.engine.stream(to_prompt(messages), **request):
                message = AIMessageChunk(content=piece.text)
                if piece.answer is not None:
                    message = AIMessageChunk(
                        content=piece.text, chunk_position="last", **self._metadata(piece.answer)
                    )
                yield ChatGenerationChunk(message=message)

    def _metadata(self, answer: Answer) -> dict[str, Any]:
        """Usage and metadata of a message. Gist slots count as input that was read from a cache."""
        num_read, gist = answer.stats.input_tokens, answer.report()
        return {
            "usage_metadata": UsageMetadata(
                input_tokens=num_read,
                output_tokens=answer.num_tokens,
                total_tokens=num_read + answer.num_tokens,
                input_token_details=InputTokenDetails(cache_read=round(answer.stats.gist_slots)),
            ),
            "response_metadata": {
                "model_name": self.model_name,
                "model_provider": PROVIDER,
                "finish_reason": answer.finish_reason,
                "gist": gist,
            },
        }

    def _resolve_model_profile(self) -> ModelProfile | None:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            tool_calling=False,
            structured_output=False,
        )
        if self.max_tokens is not None:
            profile["max_output_tokens"] = self.max_tokens
        if self.engine is not None and not isinstance(self.engine, LazyEngine):
            profile["max_input_tokens"] = self.engine.backbone.max_positions
        return profile


_ROLES: dict[type[BaseMessage], str] = {
    SystemMessage: "system",
    HumanMessage: "user",
    AIMessage: "assistant",
    ToolMessage: "tool",
    FunctionMessage: "tool",
}
_TEXT = ("text", "text-plain")
_SKIPPED = (  # tool calls are taken from the message, thoughts are not read again
    "tool_use",
    "tool_call",
    "tool_call_chunk",
    "invalid_tool_call",
    "function_call",
    "reasoning",
    "thinking",
    "redacted_thinking",
)


def to_prompt(messages: Sequence[BaseMessage]) -> list[Message]:
    """LangChain messages as a chat template takes them.

    Raises:
        BadInput: content that is not text, or a kind of message that has no role.
    """
    return [{"role": _role(message), "content": _content(message)} for message in messages]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise BadInput(f"a {type(message).__name__} has no role in a chat template")


def _content(message: BaseMessage) -> str:
    """The text of a message, followed by its tool calls as most models write them."""
    pieces = [_text(message.content)]
    for call in message.tool_calls if isinstance(message, AIMessage) else ():
        written = json.dumps({"name": call["name"], "arguments": call["args"]}, ensure_ascii=False)
        pieces.append(f"<tool_call>\n{written}\n</tool_call>")
    return "\n".join(piece for piece in pieces if piece)


def _text(content: str | Sequence[str | Mapping[str, Any]]) -> str:
    """The text of content blocks, one below the other."""
    if isinstance(content, str):
        return content
    pieces = []
    for block in content:
        if isinstance(block, str):
            pieces.append(block)
        elif block.get("type") in _TEXT:
            pieces.append(block["text"])
        elif block.get("type") == "tool_result":
            pieces.append(_text(block.get("content") or ""))
        elif block.get("type") not in _SKIPPED:
            raise BadInput(f"ChatGist reads text only, got a block of type {block.get('type')!r}")
    return "\n".join(pieces)
