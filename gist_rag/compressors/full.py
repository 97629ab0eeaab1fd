"""``full``: keeps every token. The uncompressed baseline, and what other methods start from."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from gist_rag.compressors.base import Compressor, CompressorConfig


class FullConfig(CompressorConfig):
    ratio: float = Field(default=1.0, ge=1.0, le=1.0)


class Full(Compressor):
    """Idea: the KV of a passage encoded alone, moved to wherever it is needed.

    Exact for the first passage of a prompt without a prefix; several passages do not see each
    other, which is what every cache of passages gives up (PromptCache, TurboRAG, KVLink).

    When to choose it: to see what composing costs before compressing costs anything; as the state
    that a query-time method compresses further.
    """

    name: ClassVar[str] = "full"
    Config: ClassVar[type[CompressorConfig]] = FullConfig
