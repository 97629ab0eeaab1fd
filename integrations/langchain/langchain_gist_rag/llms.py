"""``GistLLM``: text completion that reads known passages of its prompts as precompressed gists."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.documents import Document
from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import Field

from gist_rag.aio import iterate_in_thread, run_in_thread
from langchain_gist_rag._common import GistModel

if TYPE_CHECKING:
    from gist_rag import Answer
    from gist_rag.prompt import Segment


class GistLLM(GistModel, BaseLLM):
    """Completes raw prompts, without a chat template, from gists of known passages.

    Use ``ChatGist`` with instruction-tuned models. ``batch`` answers ``batch_size`` prompts, with
    different passages, in one pass per token.
    """

    batch_size: int = Field(default=8, ge=1)
    """Prompts that are answered together."""

    @property
    def _llm_type(self) -> str:
        return "gist-rag"

    def explain(self, prompt: str, **options: Any) -> list[Segment]:
        """The prompt split into text and recognised passages, as it would be read.

        Args:
            options: ``gist_mode``.
        """
        segments: list[Segment] = self.engine.segments(prompt, **options)
        return segments

    def why_not(self, passage: Document | str, prompt: str) -> str:
        """One sentence that says why a passage of a prompt was read as text, or where it stands."""
        return self._why_not(passage, prompt)

    def get_num_tokens(self, text: str) -> int:
        """Positions that a prompt takes, recognised passages counted as gists."""
        positions: int = self.engine.count(text, self.gist_mode) if text else 0
        return positions

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._answers(prompts, stop, kwargs, threading.Event())

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return await run_in_thread(lambda cancel: self._answers(prompts, stop, kwargs, cancel))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for chunk in self._pieces(prompt, stop, kwargs, threading.Event()):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        async for chunk in iterate_in_thread(
            lambda cancel: self._pieces(prompt, stop, kwargs, cancel)
        ):
            if run_manager is not None:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _answers(
        self,
        prompts: list[str],
        stop: list[str] | None,
        options: Mapping[str, Any],
        cancel: threading.Event,
    ) -> LLMResult:
        request = self._request(stop, options, cancel)
        answers: list[Answer] = []
        with self._deadline(cancel):
            for first in range(0, len(prompts), self.batch_size):
                together = prompts[first : first + self.batch_size]
                answers += self.engine.batch(together, **request)
        generations = [Generation(text=a.text, generation_info=_details(a)) for a in answers]
        return LLMResult(
            generations=[[g] for g in generations],
            llm_output={"model_name": self.model_name, "token_usage": _usage(answers)},
        )

    def _pieces(
        self,
        prompt: str,
        stop: list[str] | None,
        options: Mapping[str, Any],
        cancel: threading.Event,
    ) -> Iterator[GenerationChunk]:
        request = self._request(stop, options, cancel)
        with self._deadline(cancel):
            for piece in self.engine.stream(prompt, **request):
                info = None if piece.answer is None else _details(piece.answer)
                yield GenerationChunk(text=piece.text, generation_info=info)


def _details(answer: Answer) -> dict[str, Any]:
    return {
        "finish_reason": answer.finish_reason,
        "gist": answer.report(),
        "token_usage": _usage([answer]),
    }


def _usage(answers: list[Answer]) -> dict[str, int]:
    read = sum(answer.stats.input_tokens for answer in answers)
    written = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }
