"""``ChatGist``: a chat model that reads known passages of its prompts as precompressed gists."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.documents import Document
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
from langchain_core.messages.tool import (
    ToolCallChunk,
    invalid_tool_call,
    tool_call,
    tool_call_chunk,
)
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from gist_rag.aio import iterate_in_thread, run_in_thread
from gist_rag.errors import BadInput
from langchain_gist_rag._common import (
    PROVIDER,
    GistModel,
    LazyEngine,
    Request,
    documents_of,
    to_passages,
)

if TYPE_CHECKING:
    from gist_rag import Answer
    from gist_rag.constrain import Constraint
    from gist_rag.prompt import Segment
    from gist_rag.tools import CallReader, Piece, ToolChoice, ToolFormat
    from gist_rag.types import Message

CHARS_PER_TOKEN = 2
"""Share of the longest answer that its free strings may fill; keeps JSON from being cut off."""


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

    Messages hold text only. Tools are shown to the model as its chat template does, or described in
    the system message. ``tool_choice`` and structured output constrain what can be generated, so
    that even a small model keeps to the form.
    """

    streaming: bool = False
    """Stream internally even on ``invoke``, for callbacks that want each token."""
    max_retries: int = 0
    """Accepted because all chat models have it; there is no network to try again."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may hold several tool calls. By default only where the chat template shows
    tools by itself and none is forced: other models repeat themselves. May be given per call."""

    @property
    def _llm_type(self) -> str:
        return "gist-rag-chat"

    def explain(self, input: LanguageModelInput, **options: Any) -> list[Segment]:
        """The prompt split into text and recognised passages, as it would be read.

        Args:
            options: ``gist_mode``.
        """
        prompt = self._prompt(self._convert_input(input).to_messages())
        segments: list[Segment] = self.engine.segments(prompt, **options)
        return segments

    def why_not(self, passage: Document | str, input: LanguageModelInput) -> str:
        """One sentence that says why a passage of a prompt was read as text, or where it stands."""
        prompt = self._prompt(self._convert_input(input).to_messages())
        return self._why_not(passage, prompt)

    def in_words(self) -> Runnable[LanguageModelInput, list[BaseMessage]]:
        """A step before another chat model, a remote one too: known passages in the words of their
        gists (``gist_coco``). A passage stays as it is where its gist has no words."""
        return RunnableLambda(self._in_words)

    def _in_words(self, input: LanguageModelInput) -> list[BaseMessage]:
        messages = self._convert_input(input).to_messages()
        return [
            m.model_copy(update={"content": self.engine.in_words(m.content)})
            if isinstance(m.content, str) and m.content and not isinstance(m, AIMessage)
            else m
            for m in messages
        ]

    def get_num_tokens_from_messages(
        self,
        messages: list[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Positions that a conversation takes, recognised passages counted as gists."""
        shown = [convert_to_openai_tool(tool) for tool in tools or ()]
        positions: int = self.engine.count(self._prompt(messages), self.gist_mode, shown)
        return positions

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """This model with tools to call.

        Args:
            tool_choice: ``"auto"`` or ``None``: calls or text; ``"any"``, ``"required"`` or
                ``True``: at least one call; ``"none"``: only text; a tool's name: a call of it.
            kwargs: ``parallel_tool_calls``, and all that ``bind`` takes.

        Raises:
            BadInput: ``tool_choice`` names no tool.
        """
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        choice = _tool_choice(tool_choice)
        names = [tool["function"]["name"] for tool in formatted]
        if isinstance(choice, dict) and choice["name"] not in names:
            raise BadInput(
                f"tool_choice is {choice['name']!r}; it must be a bound tool ({', '.join(names)}), "
                "auto, any or none"
            )
        return self.bind(tools=formatted, tool_choice=choice, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """This model with answers of a schema: nothing else can be generated.

        Args:
            schema: a Pydantic class, ``TypedDict``, JSON schema or tool.
            include_raw: answer with ``{"raw": message, "parsed": ..., "parsing_error": ...}``.
            method: ``"json_schema"``; ``"json_mode"`` for any JSON object, the prompt saying which;
                ``"function_calling"`` for a call of a tool that has the schema.
            strict: accepted because others have it; it always is.
        """
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw, **kwargs)
        if method not in ("json_schema", "json_mode") or kwargs:
            raise BadInput(
                f"with_structured_output takes method json_schema, json_mode or function_calling "
                f"and include_raw, not {method!r} {', '.join(kwargs)}"
            )
        described = convert_to_json_schema(schema)
        wanted: dict[str, Any] = {"type": "json_object"}
        if method == "json_schema":
            wanted = {"type": "json_schema", "json_schema": {"schema": described}}
        model = self.bind(
            response_format=wanted,
            ls_structured_output_format={"kwargs": {"method": method}, "schema": described},
        )
        parser: BaseOutputParser[Any] = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=schema)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        )
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks(
            [failed], exception_key="parsing_error"
        )

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
        turn = self._turn(messages, stop, options, cancel)
        with self._deadline(cancel):
            answer = self.engine.generate(turn.prompt, tools=turn.tools, **turn.request)
        text, calls = answer.text, _Calls()
        if turn.tools:
            reader = self._reader()
            pieces = [*reader.push(answer.text), *reader.close()]
            text = "".join(piece.text for piece in pieces)
            for piece in pieces:
                calls.add(piece)
        message = AIMessage(
            content=text, **calls.parsed(), **self._metadata(answer, called=bool(calls))
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _pieces(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: Mapping[str, Any],
        cancel: threading.Event,
    ) -> Iterator[ChatGenerationChunk]:
        from gist_rag.tools import Piece

        turn = self._turn(messages, stop, options, cancel)
        reader, calls = self._reader() if turn.tools else None, _Calls()
        with self._deadline(cancel):
            for chunk in self.engine.stream(turn.prompt, tools=turn.tools, **turn.request):
                if reader is None:
                    pieces = [Piece(chunk.text)] if chunk.text else []
                else:
                    pieces = reader.push(chunk.text)
                    pieces += reader.close() if chunk.answer else []
                for piece in pieces:
                    written = [calls.add(piece)] if piece.call is not None else []
                    message = AIMessageChunk(content=piece.text, tool_call_chunks=written)
                    yield ChatGenerationChunk(message=message)
                if chunk.answer is not None:
                    metadata = self._metadata(chunk.answer, called=bool(calls))
                    message = AIMessageChunk(content="", chunk_position="last", **metadata)
                    yield ChatGenerationChunk(message=message)

    def _reader(self) -> CallReader:
        from gist_rag.tools import CallReader

        return CallReader(self.engine.tool_format)

    def _prompt(self, messages: Sequence[BaseMessage]) -> list[Message]:
        return to_prompt(messages, self.engine.tool_format)

    def _turn(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: Mapping[str, Any],
        cancel: threading.Event,
    ) -> _Turn:
        """One call, ready for the engine. Documents that tools found are primed on the way."""
        from gist_rag.tools import JSON_ONLY, with_instruction

        given = dict(options)
        choice = _tool_choice(given.pop("tool_choice", None))
        tools = given.pop("tools", None)
        if choice == "none" or not tools:
            tools, choice = None, "auto"
        schema = _schema(given.pop("response_format", None))
        parallel = given.pop("parallel_tool_calls", self.parallel_tool_calls)
        request = self._request(stop, given, cancel)
        if documents := [d for message in messages for d in documents_of(message)]:
            self.engine.prime(to_passages(documents), self.on_miss)
        prompt = self._prompt(messages)
        if schema is not None:
            prompt = with_instruction(prompt, JSON_ONLY.format(schema=json.dumps(schema)))
        sampling = request["sampling"]
        if sampling.constraint is None:
            max_chars = CHARS_PER_TOKEN * sampling.max_tokens
            constraint = self._constraint(tools, choice, schema, parallel, max_chars)
            request["sampling"] = replace(sampling, constraint=constraint)
        return _Turn(prompt, request, tools)

    def _constraint(
        self,
        tools: Sequence[dict[str, Any]] | None,
        choice: ToolChoice,
        schema: Mapping[str, Any] | None,
        parallel: bool | None,
        max_chars: int,
    ) -> Constraint | None:
        """What the answer to a call must look like, if it must look like anything.

        Where calling is left to the model, its calls are also well-formed if llguidance is there;
        without it they are as the model writes them.
        """
        from gist_rag.constrain import Constraint, is_available

        if not tools:
            return None if schema is None else Constraint.json(schema, max_chars=max_chars)
        if choice == "auto" and schema is None and not is_available():
            return None
        if parallel is None:
            parallel = choice == "auto" and self.engine.backbone.shows_tools
        written: ToolFormat = self.engine.tool_format
        return written.constrain(
            tools, choice, parallel=parallel, schema=schema, max_chars=max_chars
        )

    def _metadata(self, answer: Answer, *, called: bool) -> dict[str, Any]:
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
                "finish_reason": _finish_reason(answer, called),
                "gist": gist,
            },
        }

    def _resolve_model_profile(self) -> ModelProfile | None:
        profile = ModelProfile(
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            tool_calling=True,
            tool_choice=True,
            structured_output=True,
        )
        if self.max_tokens is not None:
            profile["max_output_tokens"] = self.max_tokens
        if self.engine is not None and not isinstance(self.engine, LazyEngine):
            profile["max_input_tokens"] = self.engine.backbone.max_positions
        return profile


@dataclass(frozen=True)
class _Turn:
    """One call, ready for the engine."""

    prompt: list[Message]
    request: Request
    tools: Sequence[dict[str, Any]] | None


class _Calls:
    """The tool calls of one answer, put together from pieces; each gets an id of its own."""

    def __init__(self) -> None:
        self._chunks: dict[int, ToolCallChunk] = {}

    def __len__(self) -> int:
        return len(self._chunks)

    def add(self, piece: Piece) -> ToolCallChunk | None:
        """What a piece adds; an id stands in the first chunk of each call."""
        if piece.call is None:
            return None
        known = self._chunks.get(piece.call)
        id = None if known else f"call_{uuid.uuid4().hex[:24]}"
        chunk = tool_call_chunk(name=piece.name, args=piece.arguments, id=id, index=piece.call)
        if known:
            known["args"] = (known["args"] or "") + piece.arguments
        else:
            self._chunks[piece.call] = chunk.copy()
        return chunk

    def parsed(self) -> dict[str, list[Any]]:
        """The fields of a message that hold them."""
        good, bad = [], []
        for chunk in self._chunks.values():
            name, written, id = chunk["name"], chunk["args"], chunk["id"]
            try:
                arguments = json.loads(written or "")
            except ValueError as error:
                bad.append(invalid_tool_call(name=name, args=written, id=id, error=str(error)))
                continue
            if name is not None and isinstance(arguments, dict):
                good.append(tool_call(name=name, args=arguments, id=id))
            else:
                why = "no call of a tool by name, with an object of arguments"
                bad.append(invalid_tool_call(name=name, args=written, id=id, error=why))
        return {"tool_calls": good, "invalid_tool_calls": bad}


def _tool_choice(given: str | bool | Mapping[str, Any] | None) -> ToolChoice | Literal["none"]:
    """``tool_choice`` as LangChain's models take it, in one form."""
    if isinstance(given, Mapping):
        name = given.get("function", given).get("name")
        if not isinstance(name, str):
            raise BadInput(f"tool_choice is {given!r}; as a dict it must name a function")
        return {"name": name}
    if given in (None, False, "auto"):
        return "auto"
    if given in (True, "any", "required"):
        return "required"
    return "none" if given == "none" else {"name": str(given)}


def _schema(response_format: Any) -> dict[str, Any] | None:
    """The schema in a ``response_format`` as OpenAI takes it."""
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema" and "schema" in response_format.get("json_schema", {}):
        return dict(response_format["json_schema"]["schema"])
    if kind == "text":
        return None
    raise BadInput(
        f"response_format is {response_format!r}; its type must be json_schema, json_object or text"
    )


def _finish_reason(answer: Answer, called: bool) -> str:
    return "tool_calls" if called and answer.finish_reason == "stop" else answer.finish_reason


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


def to_prompt(messages: Sequence[BaseMessage], written: ToolFormat) -> list[Message]:
    """LangChain messages as a chat template takes them, tool calls as the model writes them.

    Raises:
        BadInput: content that is not text, or a kind of message that has no role.
    """
    return [{"role": _role(m), "content": _content(m, written)} for m in messages]


def _role(message: BaseMessage) -> str:
    if isinstance(message, ChatMessage):
        return message.role
    for kind, role in _ROLES.items():
        if isinstance(message, kind):
            return role
    raise BadInput(f"a {type(message).__name__} has no role in a chat template")


def _content(message: BaseMessage, written: ToolFormat) -> str:
    """The text of a message, followed by its tool calls."""
    calls = message.tool_calls if isinstance(message, AIMessage) else []
    pieces = [_text(message.content), *(written.write(c["name"], c["args"]) for c in calls)]
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
