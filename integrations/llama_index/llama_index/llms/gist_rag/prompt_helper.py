"""``GistPromptHelper``: plans prompts by what their passages really take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from llama_index.core.base.llms.types import LLMMetadata
from llama_index.core.indices.prompt_helper import DEFAULT_PADDING, PromptHelper
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.tools.types import BaseTool

from llama_index.llms.gist_rag.base import GistLLM

SEPARATOR = "\n\n"


class GistPromptHelper(PromptHelper):
    """Counts a passage that has a gist by its slots, so that more passages fit into one prompt.

    Unlike the stock helper it fills prompts with whole passages and cuts only one that is too long
    by itself: of a passage that is cut in two, neither half is recognised.

    Example:
        >>> Settings.prompt_helper = GistPromptHelper.from_llm(llm)
    """

    @classmethod
    def class_name(cls) -> str:
        return "GistPromptHelper"

    @classmethod
    def from_llm(cls, llm: GistLLM, **options: Any) -> Self:
        """A helper for the window of an LLM.

        Args:
            options: ``chunk_overlap_ratio``, ``chunk_size_limit`` and ``separator``, as of
                ``PromptHelper``.
        """
        metadata: LLMMetadata = llm.metadata
        return cls(
            context_window=metadata.context_window,
            num_output=metadata.num_output,
            tokenizer=lambda text: [0] * llm.count_tokens(text),
            **options,
        )

    def repack(
        self,
        prompt: BasePromptTemplate,
        text_chunks: Sequence[str],
        padding: int = DEFAULT_PADDING,
        llm: LLM | None = None,
        tools: list[BaseTool] | None = None,
    ) -> list[str]:
        splitter = self.get_text_splitter_given_prompt(
            prompt, padding=padding, llm=llm, tools=tools
        )
        between = self._token_counter.get_string_tokens(f".{SEPARATOR}.")
        packed: list[str] = []
        room = 0
        for chunk in filter(None, (chunk.strip() for chunk in text_chunks)):
            size = self._token_counter.get_string_tokens(chunk) + between
            if size <= room:
                packed[-1] += SEPARATOR + chunk
                room -= size
            elif size - between <= splitter.chunk_size:
                packed.append(chunk)
                room = splitter.chunk_size - size
            else:
                packed += splitter.split_text(chunk)
                room = 0
        return packed
