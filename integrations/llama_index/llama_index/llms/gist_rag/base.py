"""``GistLLM``: a LlamaIndex LLM that reads known passages as precompressed gists."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

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
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_validator
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import LLM
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from rich.progress import Progress

from gist_rag.aio import iterate_in_thread, run_in_thread
from gist_rag.errors import BadInput
from gist_rag.models import DEFAULT_MODEL

if TYPE_CHECKING:  # these import torch, which importing this class should not
    from gist_rag import Answer, GistEngine, Sampling
    from gist_rag.engine import Precomputed
    from gist_rag.prompt import Segment
    from gist_rag.types import Message

GistMode = Literal["auto", "off", "require"]
Response = TypeVar("Response", ChatResponse, CompletionResponse)


class GistLLM(LLM):
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
    ``max_tokens``, ``temperature``, ``top_p``, ``top_k``, ``seed``, ``stop`` and ``gist_mode``.

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
    ratio: float | None = Field(
        default=None, gt=0, description="Compression ratio, short for settings['ratio']."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Further settings of the compressor."
    )
    codec: str = Field(default="bf16", description="How gists are stored.")
    namespace: str = Field(
        default="", description="Tenant; gists of another namespace are never read."
    )
    dtype: str | None = Field(default=None, description="Of the weights, such as 'bfloat16'.")
    device: str | None = Field(default=None, description="Where the model runs, such as 'cuda'.")
    gist_mode: GistMode = Field(
        default="auto",
        description="auto: read known passages as gists; off: read all as text; require: raise "
        "GistsRequired when no passage of the prompt has a gist.",
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

    def __init__(self, engine: GistEngine | None = None, **fields: Any) -> None:
        if engine is not None:
            clashes = fields.keys() & _NAMES_ENGINE
            if clashes:
                raise BadInput(
                    f"engine= brings its own {', '.join(sorted(clashes))}; leave these out"
                )
            fields["model_name"] = engine.backbone.name
        _warn_unknown(fields.keys() - type(self).model_fields.keys(), type(self).__name__)
        super().__init__(**fields)
        self._engine = engine

    @field_validator("store", "compressor", mode="before")
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
        from gist_rag import Passage

        passages = [
            Passage(node)
            if isinstance(node, str)
            else Passage(node.get_content(MetadataMode.NONE), id=node.node_id)
            for node in nodes
        ]
        if not show_progress:
            return self.engine.precompute(passages)
        with Progress() as bar:
            task = bar.add_task("Compressing passages", total=None)
            return self.engine.precompute(
                passages,
                progress=lambda done, total, _tokens: bar.update(task, completed=done, total=total),
            )

    def explain(
        self, prompt: str | Sequence[ChatMessage], gist_mode: GistMode | None = None
    ) -> list[Segment]:
        """The prompt split into text and recognised passages, as it would be read."""
        read = prompt if isinstance(prompt, str) else self._prompt(prompt)
        return self.engine.segments(read, gist_mode or self.gist_mode)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._answer(_chat, self._prompt(messages), kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self._answer(_completion, self._format(prompt, formatted), kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return self._pieces(_chat, self._prompt(messages), kwargs)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        return self._pieces(_completion, self._format(prompt, formatted), kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        read = self._prompt(messages)
        return await run_in_thread(lambda cancel: self._answer(_chat, read, kwargs, cancel))

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        read = self._format(prompt, formatted)
        return await run_in_thread(lambda cancel: self._answer(_completion, read, kwargs, cancel))

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        read = self._prompt(messages)
        return iterate_in_thread(lambda cancel: self._pieces(_chat, read, kwargs, cancel))

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        read = self._format(prompt, formatted)
        return iterate_in_thread(lambda cancel: self._pieces(_completion, read, kwargs, cancel))

    # The public methods are decorated and each reports one event, so none of them calls another.

    def _answer(
        self,
        respond: Callable[..., Response],
        prompt: str | list[Message],
        options: Mapping[str, Any],
        cancel: threading.Event | None = None,
    ) -> Response:
        sampling, gist_mode = self._options(options)
        answer = self.engine.generate(prompt, sampling, gist_mode=gist_mode, cancel=cancel)
        return respond(answer.text, **_details(answer))

    def _pieces(
        self,
        respond: Callable[..., Response],
        prompt: str | list[Message],
        options: Mapping[str, Any],
        cancel: threading.Event | None = None,
    ) -> Generator[Response, None, None]:
        sampling, gist_mode = self._options(options)
        text = ""
        for piece in self.engine.stream(prompt, sampling, gist_mode=gist_mode, cancel=cancel):
            text += piece.text
            details = {} if piece.answer is None else _details(piece.answer)
            yield respond(text, delta=piece.text, **details)

    def _prompt(self, messages: Sequence[ChatMessage]) -> str | list[Message]:
        """Messages for the model's chat template, or what ``messages_to_prompt`` makes of them."""
        chosen = self.messages_to_prompt
        if chosen is not None and chosen is not generic_messages_to_prompt:
            return chosen(messages)
        return [{"role": _role(message), "content": _text(message)} for message in messages]

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

        return GistEngine.from_pretrained(
            self.model_name,
            self.store,
            compressor=self.compressor,
            ratio=self.ratio,
            settings=self.settings,
            codec=self.codec,
            namespace=self.namespace,
            dtype=self.dtype,
            device=self.device,
        )


_NAMES_ENGINE = {
    "model_name",
    "store",
    "compressor",
    "ratio",
    "settings",
    "codec",
    "namespace",
    "dtype",
    "device",
}
_SAMPLES = {"max_tokens", "temperature", "top_p", "top_k", "seed", "stop"}
_ROLES = {
    MessageRole.DEVELOPER: "system",
    MessageRole.FUNCTION: "tool",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
}
_building = threading.Lock()  # not an attribute, as an LLM with a lock could not be copied


def _chat(text: str, **details: Any) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, **details)


def _completion(text: str, **details: Any) -> CompletionResponse:
    return CompletionResponse(text=text, **details)


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


def _role(message: ChatMessage) -> str:
    return _ROLES.get(message.role, message.role.value)


def _text(message: ChatMessage) -> str:
    """The text of a message, its tool calls written as most models write them."""
    pieces = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            pieces.append(block.text)
        elif isinstance(block, ToolCallBlock):
            call = {"name": block.tool_name, "arguments": block.tool_kwargs}
            written = json.dumps(call, ensure_ascii=False)
            pieces.append(f"<tool_call>\n{written}\n</tool_call>")
        elif not isinstance(block, ThinkingBlock):
            raise BadInput(f"GistLLM reads text only, got a block of type {block.block_type!r}")
    return "\n".join(pieces)


def _warn_unknown(names: set[str], place: str) -> None:
    if names:
        warnings.warn(f"{place} does not know {', '.join(sorted(names))}: ignored", stacklevel=3)
