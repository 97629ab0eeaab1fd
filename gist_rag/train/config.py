"""What a training run is: saved beside its weights, read back to resume it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gist_rag.compose import DEFAULT_POSITIONS, Positions
from gist_rag.compressors import DEFAULT_COMPRESSOR
from gist_rag.errors import BadInput
from gist_rag.lora import LoRAConfig
from gist_rag.models import DEFAULT_RAG_MODEL

READER = "reader"
"""The ``method`` that trains who reads, from full text, instead of a compressor."""


class TrainConfig(BaseModel):
    """Settings of a run.

    Attributes:
        method: a compressor, or ``reader``.
        task: what is learnt from: ``passages``, gists of which are to be read as their text, or
            ``thoughts``, which a method compresses while it decodes them (``train.traces``), and
            a ``reader``, for comparison, writes as they are.
        data: files of questions (``gist_rag.questions``), or of worked answers for ``thoughts``;
            where no question is asked, also a corpus, as ``precompute`` takes it.
        ratios: compression ratios, one drawn per step.
        passages: fewest and most passages beside a question, distractors included.
        max_passage_tokens: longer passages, or questions with their thoughts, are left out.
        text_share: how often one passage of a prompt stays text (not for the ``reader``).
        closed_share: how often there are no passages (``reader`` only), so that the model without
            documents is a fair reference too.
        unanswerable_share: how often no passage holds the answer (``reader`` only).
        gist_share: how often all passages are read as gists, by ``compressor`` at one of the
            ``ratios`` (1: uncompressed), and not as text (``reader`` only).
        compressor: of those gists.
        invocation: where in a prompt the ``reader`` begins, see ``reader.Reader``.
        reader: alias or folder of the reader that teaches a compressor and reads its gists;
            default: the one that belongs to ``model``, if there is one. A ``reader`` goes on from
            this one, and starts from nothing by default.
        batch_size: questions per step.
        questions_per_context: most of them that are asked of the same passages, which are read or
            compressed once for all of these. The files must hold such questions. 0: none is
            asked, gists learn from their passages alone (by the weight of ``match``, ``score``
            or ``repeat``, and what else the method has), which costs less.
        lr: peak learning rate; gist embeddings learn ``embedding_lr_factor`` times as fast.
        warmup: share of the steps; then a cosine down to a tenth.
        weights: of loss terms, where a run differs from the method's own; ``match``,
            ``score`` and ``repeat`` come on top (``train.students``).
        lora: of a ``reader`` that starts from nothing; compressors have theirs in ``settings``.
        settings: of the compressor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    task: Literal["passages", "thoughts"] = "passages"
    data: tuple[Path, ...] = Field(min_length=1)
    out: Path
    model: str = DEFAULT_RAG_MODEL
    dtype: str | None = None
    device: str | None = None
    ratios: tuple[float, ...] = Field(default=(4.0,), min_length=1)
    passages: tuple[int, int] = (1, 4)
    max_passage_tokens: int = Field(default=256, ge=8)
    text_share: float = Field(default=0.1, ge=0, le=1)
    closed_share: float = Field(default=0.1, ge=0, le=1)
    unanswerable_share: float = Field(default=0.05, ge=0, le=1)
    gist_share: float = Field(default=0.5, ge=0, le=1)
    compressor: str = DEFAULT_COMPRESSOR
    invocation: str = ""
    reader: str | None = None
    positions: Positions = DEFAULT_POSITIONS
    steps: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    questions_per_context: int = Field(default=1, ge=0)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=2e-4, gt=0)
    embedding_lr_factor: float = Field(default=5.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)
    weights: dict[str, float] = Field(default_factory=dict)
    lora: LoRAConfig = LoRAConfig()
    settings: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0
    save_every: int = Field(default=200, ge=1)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        fewest, most = self.passages
        if not 1 <= fewest <= most:
            raise ValueError(f"passages {self.passages}: must be 1 <= fewest <= most")
        if any(ratio < 1 for ratio in self.ratios):
            raise ValueError(f"ratios {self.ratios}: each must be 1 or more")
        return self

    @classmethod
    def read(cls, given: dict[str, Any]) -> TrainConfig:
        """Validate, naming every fault.

        Raises:
            BadInput: a setting that does not exist, or a value that cannot be.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            faults = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors()
            )
            raise BadInput(f"training config: {faults}") from error
