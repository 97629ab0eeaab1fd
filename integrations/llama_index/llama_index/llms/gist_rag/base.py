"""``GistLLM``: a LlamaIndex LLM that reads known passages as precompressed gists."""

from __future__ import annotations

import threading
import warnings
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as generic_messages_to_prompt,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    TextBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_validator
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.utils import FlexibleModel
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import Model
from pydantic import PositiveFloat
from rich.progress import Progress

from gist_rag.aio import iterate_in_thread, run_in_thread
from gist_rag.errors import BadInput
from gist_rag.models import DEFAULT_MODEL
from gist_rag.modes import NAMES_ENGINE, GistMode, OnMiss
from llama_index.llms.gist_rag.messages import AnswerReader, text_of, to_role, tool_calls_in

if TYPE_CHECKING:  # these import torch, which importing this class should not
    from gist_rag import Answer, GistEngine, Passage, Sampling
    from gist_rag.engine import Precomputed
    from gist_rag.prompt import Segment
    from gist_rag.tools import ToolChoice, ToolFormat
    from gist_rag.types import Message

Response = TypeVar("Response", ChatResponse, CompletionResponse)


class GistLLM(FunctionCallingLLM):
    """A local LLM that reads precompressed gists of known passages.

    Query engines, synthesizers and chat engines stay as they are: a passage that was given to
    ``precompress`` is recognised by its text wherever it stands in a prompt.

    Example:
        >>> llm = GistLLM(store="./gists", ratio=8)
        >>> llm.precompress(nodes)
        >>> llm.chat([ChatMessage(nodes[0].get_content())]).raw["gist"]["hits"]
        1

    Responses carry ``raw["usage"]`` (also as ``additional_kwargs``), ``raw["gist"]`` and
    ``raw["finish_reason"]``; of a stream, the last one does. Options of single calls are
    ``max_tokens``, ``temperature``, ``top_p``, ``top_k``, ``seed``, ``stop`` and ``gist_mode``; of
    chats also ``tools``, ``tool_choice`` and ``allow_parallel_tool_calls``. Calls and structured
    output are held to their schemas while they are generated, which needs ``gist-rag[tools]``.

    Args:
        engine: a ``GistEngine`` to share; without one, the fields below name the engine that is
            built on first use.
    """

    model_name: str = Field(
        default=DEFAULT_MODEL, description="Alias, local folder or Hugging Face id of the model."
    )
    store: str | None = Field(
        default=None, description="Folder of the gists; None keeps them as long as this object."
    )
    compressor: str | None = Field(
        default=None, description="Compression method, or the folder of a trained compressor."
    )
    ratio: PositiveFloat | list[PositiveFloat] | None = Field(
        default=None,
        description="Compression ratio; or several, the finest first, for a budget to choose from.",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Further settings of the compressor."
    )
    codec: str = Field(default="bf16", description="How gists are stored.")
    namespace: str = Field(
        default="", description="Tenant; gists of another namespace are never read."
    )
    reader: str | None = Field(
        default=None, description="Alias or folder of a trained reader, who answers."
    )
    judge: str | None = Field(
        default=None,
        description="Who says which of its passages a prompt is about, so that each is read with "
        "the weight that it deserves: the name of an embedder, or 'likelihood' for the model "
        "itself; None: all weigh alike.",
    )
    focus: int | None = Field(
        default=None,
        ge=1,
        description="How many of its passages a prompt reads as gists: those that matter most; "
        "None for all.",
    )
    apart: int | None = Field(
        default=None,
        ge=1,
        description="How many passages are read each by itself; they answer with a reading of all "
        "together: better answers from several passages, later first tokens.",
    )
    expand: float | None = Field(
        default=None,
        ge=0,
        description="Entropy of an answer's first token, in nats, from which on the passage that "
        "matters most is read as text after all.",
    )
    budget: int | float | str | None = Field(
        default=None,
        description="What the gists of a prompt may take together: a number of slots, or as in "
        "'16x' or '2.5MB'. Passages that were compressed at several ratios are then read the "
        "finer, the more they matter.",
    )
    dtype: str | None = Field(default=None, description="Of the weights, such as 'bfloat16'.")
    device: str | None = Field(default=None, description="Where the model runs, such as 'cuda'.")
    gist_mode: GistMode = Field(
        default="auto",
        description="auto: read known passages as gists; off: read all as text; require: raise "
        "GistsRequired when no passage of the prompt has a gist; text: read the words of gists "
        "that have some.",
    )
    context_window: int | None = Field(
        default=None, gt=0, description="Tokens to plan prompts for; None is the model's window."
    )
    max_new_tokens: int = Field(
        default=DEFAULT_NUM_OUTPUTS, gt=0, description="Longest answer, in tokens."
    )
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Options of every call, see the class."
    )
    is_chat_model: bool = Field(
        default=True, description="Whether query engines send messages rather than a raw prompt."
    )
    _engine: GistEngine | None = PrivateAttr(default=None)
    _engine_is_given: bool = PrivateAttr(default=False)

    def __init__(self, engine: GistEngine | None = None, **fields: Any) -> None:
        if engine is not None:
            clashes = fields.keys() & set(NAMES_ENGINE)
            if clashes:
                raise BadInput(
                    f"engine= brings its own {', '.join(sorted(clashes))}; leave these out"
                )
            fields["model_name"] = engine.backbone.name
        fields.pop("class_name", None)  # where a saved component holds this one
        _warn_unknown(fields.keys() - type(self).model_fields.keys(), type(self).__name__)
        super().__init__(**fields)
        self._engine = engine
        self._engine_is_given = engine is not None

    def __getstate__(self) -> dict[str, Any]:
        if self._engine_is_given:
            raise BadInput(
                "a GistLLM made with engine= cannot be sent to another process; name its model and "
                "store instead"
            )
        bare = self.model_copy()
        bare._engine = None  # the base class would pickle the model, to find that it cannot
        return super(GistLLM, bare).__getstate__()

    @field_validator("store", "compressor", "reader", "judge", mode="before")
    @classmethod
    def _path_to_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @classmethod
    def class_name(cls) -> str:
        return "GistLLM"

    @property
    def engine(self) -> GistEngine:
        """The engine that reads; the first use builds it."""
        if self._engine is None:
            with _building:
                self._engine = self._engine or self._build_engine()
        return self._engine

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self.context_window or self.engine.backbone.max_positions,
            num_output=self.max_new_tokens,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=self.is_chat_model and find_spec("llguidance") is not None,
            model_name=self.model_name,
        )

    def to_payload(self) -> dict[str, Any]:
        """What events tell of this LLM. Unlike the base class's, it never builds the engine."""
        shown = {"model_name", "max_new_tokens", "temperature", "is_chat_model", "gist_mode"}
        return self.model_dump(include=shown)

    def precompress(
        self, nodes: Sequence[BaseNode | NodeWithScore | str], show_progress: bool = False
    ) -> Precomputed:
        """Compress passages that have no gist yet, to be recognised in prompts from then on.

        Metadata of a node may stand before its text in a prompt and is not compressed.

        Returns:
            How many were written and skipped, their tokens, bytes and seconds.
        """
        passages = _passages(nodes)
        if not show_progress:
            return self.engine.precompute(passages)
        with Progress() as bar:
            task = bar.add_task("Compressing passages", total=None)
            return self.engine.precompute(
                passages,
                progress=lambda done, total, _tokens: bar.update(task, completed=done, total=total),
            )

    def prime(
        self, nodes: Sequence[BaseNode | NodeWithScore | str], on_miss: OnMiss = "inline"
    ) -> None:
        """``precompress`` for passages that turn up while a question waits: it raises nothing.

        Args:
            on_miss: ``inline`` compresses now, ``background`` soon, in a thread of its own.
        """
        self.engine.prime(_passages(nodes), on_miss)

    def explain(
        self, prompt: str | Sequence[ChatMessage], gist_mode: GistMode | None = None
    ) -> list[Segment]:
        """The prompt split into text and recognised passages, as it would be read."""
        read = prompt if isinstance(prompt, str) else self._prompt(prompt)
        return self.engine.segments(read, gist_mode or self.gist_mode)

    def in_words(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """The messages with known passages in the words of their gists, for other LLMs, remote ones
        too. A passage stays as it is where its gist has no words."""
        return [
            m
            if to_role(m) == "assistant"
            else m.model_copy(update={"blocks": [self._block_in_words(b) for b in m.blocks]})
            for m in messages
        ]

    def _block_in_words(self, block: Any) -> Any:
        if not isinstance(block, TextBlock) or not block.text:
            return block
        return TextBlock(text=self.engine.in_words(block.text))

    def why_not(
        self, passage: BaseNode | NodeWithScore | str, prompt: str | Sequence[ChatMessage]
    ) -> str:
        """One sentence that says why a passage of a prompt was read as text, or where it stands."""
        [known] = _passages([passage])
        read = prompt if isinstance(prompt, str) else self._prompt(prompt)
        return self.engine.why_not(known.text, read)

    def count_tokens(self, text: str) -> int:
        """Positions that a piece of a prompt takes: tokens of its text and slots of its gists."""
        # The last passage of a prompt is read as text, but a piece is not the last one.
        return self.engine.count(f"{text}\n", self.gist_mode) if text.strip() else 0

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._answer(_chat, self._chat_request(messages, kwargs))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self._answer(_completion, self._text_request(prompt, formatted, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._pieces(_chat, self._chat_request(messages, kwargs))

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        return self._pieces(_completion, self._text_request(prompt, formatted, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await run_in_thread(
            lambda cancel: self._answer(_chat, self._chat_request(messages, kwargs), cancel)
        )

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        return await run_in_thread(
            lambda cancel: self._answer(
                _completion, self._text_request(prompt, formatted, kwargs), cancel
            )
        )

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        return iterate_in_thread(
            lambda cancel: self._pieces(_chat, self._chat_request(messages, kwargs), cancel)
        )

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        return iterate_in_thread(
            lambda cancel: self._pieces(
                _completion, self._text_request(prompt, formatted, kwargs), cancel
            )
        )

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        calls = tool_calls_in(response.message)
        if not calls and error_on_no_tool_call:
            raise ValueError(f"the answer calls no tool: {response.message.content!r}")
        return calls

    # LlamaIndex's program requires its call, but forgets to when it streams; must_call reminds it.

    def stream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[Model | FlexibleModel, None, None]:
        options = self._with_call(llm_kwargs)
        yield from super().stream_structured_predict(output_cls, prompt, options, **prompt_args)

    async def astream_structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[Model | FlexibleModel, None]:
        options = self._with_call(llm_kwargs)
        return await super().astream_structured_predict(output_cls, prompt, options, **prompt_args)

    def _with_call(self, llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
        required = {"must_call": True} if self.metadata.is_function_calling_model else {}
        return {**(llm_kwargs or {}), **required}

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        must_call: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = [*(chat_history or [])]
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        if tool_required or must_call:
            kwargs["tool_choice"] = _specific(kwargs.get("tool_choice")) or "required"
        return {
            **kwargs,
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
        }

    # The public methods are decorated and each reports one event, so none of them calls another.

    def _answer(
        self,
        respond: Callable[..., Response],
        request: _Request,
        cancel: threading.Event | None = None,
    ) -> Response:
        answer = self.engine.generate(
            request.prompt,
            request.sampling,
            gist_mode=request.gist_mode,
            cancel=cancel,
            tools=request.tools,
        )
        reader = AnswerReader(request.tool_format)
        reader.push(answer.text)
        reader.close()
        return respond(reader, **_details(answer))

    def _pieces(
        self,
        respond: Callable[..., Response],
        request: _Request,
        cancel: threading.Event | None = None,
    ) -> Generator[Response, None, None]:
        reader = AnswerReader(request.tool_format)
        for piece in self.engine.stream(
            request.prompt,
            request.sampling,
            gist_mode=request.gist_mode,
            cancel=cancel,
            tools=request.tools,
        ):
            delta = reader.push(piece.text)
            details: dict[str, Any] = {}
            if piece.answer is not None:
                delta += reader.close()
                details = _details(piece.answer)
            yield respond(reader, delta=delta, **details)

    def _chat_request(
        self, messages: Sequence[ChatMessage], options: Mapping[str, Any]
    ) -> _Request:
        options = dict(options)
        tools = options.pop("tools", None) or ()
        choice = _choice(options.pop("tool_choice", None))
        parallel = bool(options.pop("allow_parallel_tool_calls", False))
        sampling, gist_mode = self._options(options)
        prompt = self._prompt(messages)
        if not tools or choice is None:
            return _Request(prompt, sampling, gist_mode)
        form = self.engine.tool_format
        constraint = form.constrain(tools, choice, parallel=parallel)
        return _Request(prompt, replace(sampling, constraint=constraint), gist_mode, tools, form)

    def _text_request(self, prompt: str, formatted: bool, options: Mapping[str, Any]) -> _Request:
        return _Request(self._format(prompt, formatted), *self._options(options))

    def _prompt(self, messages: Sequence[ChatMessage]) -> str | list[Message]:
        """Messages for the model's chat template, or what ``messages_to_prompt`` makes of them."""
        chosen = self.messages_to_prompt
        if chosen is not None and chosen is not generic_messages_to_prompt:
            return chosen(messages)
        write = self.engine.tool_format.write
        return [{"role": to_role(m), "content": text_of(m, write)} for m in messages]

    def _format(self, prompt: str, formatted: bool) -> str:
        if formatted or self.completion_to_prompt is None:
            return prompt
        return self.completion_to_prompt(prompt)

    def _options(self, given: Mapping[str, Any]) -> tuple[Sampling, GistMode]:
        """How to generate: fields, overridden by ``generate_kwargs``, overridden by one call."""
        from gist_rag import Sampling

        options = {**self.generate_kwargs, **given}
        gist_mode = options.pop("gist_mode", self.gist_mode)
        _warn_unknown(options.keys() - _SAMPLES, "a call")
        fields = {"max_tokens": self.max_new_tokens, "temperature": self.temperature}
        chosen = {k: v for k, v in options.items() if k in _SAMPLES and v is not None}
        return Sampling(**{**fields, **chosen}), gist_mode

    def _build_engine(self) -> GistEngine:
        from gist_rag import GistEngine

        model, *others = NAMES_ENGINE
        named = {name: getattr(self, name) for name in others}
        return GistEngine.from_pretrained(getattr(self, model), **named)


_SAMPLES = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop"}
_building = threading.Lock()  # not an attribute, as an LLM with a lock could not be copied


@dataclass(frozen=True)
class _Request:
    """What one call asks of the engine."""

    prompt: str | list[Message]
    sampling: Sampling
    gist_mode: GistMode
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_format: ToolFormat | None = None


def _chat(reader: AnswerReader, **details: Any) -> ChatResponse:
    return ChatResponse(message=reader.message(), **details)


def _completion(reader: AnswerReader, **details: Any) -> CompletionResponse:
    return CompletionResponse(text=reader.text, **details)


def _choice(choice: str | Mapping[str, Any] | None) -> ToolChoice | None:
    """``tool_choice`` in all its spellings; ``None`` if no tool may be called."""
    if choice == "none":
        return None
    if choice in ("any", "required"):
        return "required"
    return _specific(choice) or "auto"


def _specific(choice: str | Mapping[str, Any] | None) -> dict[str, str] | None:
    """The one tool that is asked for by name."""
    if isinstance(choice, Mapping):
        return {"name": choice.get("function", choice)["name"]}
    return None if choice in (None, "auto", "none", "any", "required") else {"name": str(choice)}


def _passages(nodes: Sequence[BaseNode | NodeWithScore | str]) -> list[Passage]:
    """The texts of nodes, without their metadata; nodes without any are left out."""
    from gist_rag import Passage

    texts = [
        (node, "") if isinstance(node, str) else (node.get_content(MetadataMode.NONE), node.node_id)
        for node in nodes
    ]
    return [Passage(text, id=id_) for text, id_ in texts if text.strip()]


def _details(answer: Answer) -> dict[str, Any]:
    """Usage of an answer, under the names that LlamaIndex counts by, and its gist report.

    Prompt tokens are the positions that were attended to: text tokens and gist slots.
    """
    stats = answer.stats
    usage = {
        "prompt_tokens": stats.input_tokens,
        "completion_tokens": answer.num_tokens,
        "total_tokens": stats.input_tokens + answer.num_tokens,
        "gist_tokens": round(stats.gist_slots),
        "gist_source_tokens": stats.source_tokens,
        "gist_passages": stats.hits,
    }
    raw = {"usage": usage, "gist": answer.report(), "finish_reason": answer.finish_reason}
    return {"raw": raw, "additional_kwargs": usage}


def _warn_unknown(names: set[str], place: str) -> None:
    if names:
        warnings.warn(f"{place} does not know {', '.join(sorted(names))}: ignored", stacklevel=3)
