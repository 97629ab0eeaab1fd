"""``Compressor``: the path that all methods share, and the hooks where they differ.

    compress = layout > encode > extract > finish

A method overrides one to three hooks. The backbone is borrowed: never a submodule, never saved,
never trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.compose import Placed, compose
from gist_rag.errors import BadInput, PassageTooLong, UnknownCompressor
from gist_rag.layout import Layout
from gist_rag.lora import LoRA, LoRAConfig
from gist_rag.losses import cross_entropy, distill
from gist_rag.prompt import framing
from gist_rag.types import GistState

FORMAT = 1
WRITE = "\n\nWrite down in short what the text above says."
MAX_LM_TOKENS = 1024
"""Of a step, in a language-modelling term: 200 MB of float32 logits at 50,000 tokens."""


class CompressorConfig(BaseModel):
    """Settings of a compressor: what is saved, what the CLI takes, what the fingerprint covers.

    ``ratio`` is tokens per kept slot of an average head.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ratio: float = Field(default=8.0, ge=1.0)


class NestedConfig(CompressorConfig):
    """Settings of a compressor that may compress at several ratios at once.

    ``coarser`` are further ratios, rising, at which a passage is kept besides (``budget``).
    """

    coarser: tuple[Annotated[float, Field(ge=1.0, allow_inf_nan=False)], ...] = ()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``coarser`` where there are none: gists are then those of before there were."""
        written: dict[str, Any] = handler(self)
        return {k: v for k, v in written.items() if k != "coarser" or v}

    @model_validator(mode="after")
    def _check_coarser(self) -> Self:
        if any(fine >= coarse for fine, coarse in pairwise(self.ratios)):
            raise ValueError(f"coarser ratios must rise, all above {self.ratio:g}")
        return self

    @property
    def ratios(self) -> tuple[float, ...]:
        return (self.ratio, *self.coarser)


@dataclass(frozen=True)
class Lesson:
    """What a training step has compressed.

    Attributes:
        passages: token ids ``(T_i,)`` of all passages of the batch.
        hidden: ``(L + 1, B, S, E)`` residual streams of the compress pass.
        states: what was made of them.
    """

    passages: Sequence[Tensor]
    hidden: Tensor
    states: Sequence[GistState]


@dataclass(frozen=True)
class Answers:
    """What a training step has read.

    Attributes:
        student: ``(N, V)`` logits of the answers' tokens, read after the gists.
        teacher: ``(N, V)`` logits of the plain model that reads the text.
        targets: ``(N,)`` the answers' tokens.
        weights: ``(N,)`` summing to 1; every answer counts alike, whatever its length.
        closed: ``(N, V)`` logits of the plain model without any passage; for methods whose
            ``reads_closed`` says that they want them.
    """

    student: Tensor
    teacher: Tensor
    targets: Tensor
    weights: Tensor
    closed: Tensor | None = None


@dataclass(frozen=True)
class Thoughts:
    """A prompt and the thoughts that answer it.

    Attributes:
        ids: ``(T,)``.
        ends: exclusive ends in ``ids`` of the prompt and of each thought.
    """

    ids: Tensor
    ends: Sequence[int]

    @property
    def num_given(self) -> int:
        """Tokens of the prompt."""
        return self.ends[0]


class Compressor(nn.Module):
    """Turns passages into ``GistState``s, independent of question and neighbours.

    Attributes:
        name: how users ask for it.
        paper: where it comes from; empty for controls.
        Config: its settings.
        trained: whether it needs trained weights to be of use.
        loss_weights: how loss terms are summed up, unless a training run says else.
        reads_closed: whether ``answer_losses`` needs ``Answers.closed``.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    Config: ClassVar[type[CompressorConfig]] = CompressorConfig
    trained: ClassVar[bool] = False
    loss_weights: ClassVar[Mapping[str, float]] = {}
    reads_closed: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # keeps it out of parameters and state_dict
        self.config = config if config is not None else self.Config()
        self.folder = None

    backbone: Backbone
    folder: Path | str | None
    """Where it was read from, if it was; of one that ships, its name."""

    # ---- hooks

    def layout(self, input_ids: Tensor) -> Layout:
        """Where gists stand among the tokens ``(T,)`` and who sees whom; default: tokens only."""
        return Layout.tokens(len(input_ids))

    def embeddings(self) -> Tensor | None:
        """``(num_gists, E)`` input embeddings of the gists that ``layout`` places, if any."""
        return None

    def gist_inputs(self, tokens: Tensor, layout: Layout) -> Tensor:
        """What the gists of one passage start from, ``(G, E)``; default: their embeddings.

        Args:
            tokens: ``(T, E)`` input embeddings of the passage.
        """
        gists = self.embeddings()
        assert gists is not None
        return gists[-1 - layout.source[layout.is_gist].to(gists.device)]

    def extract(self, hidden: Tensor, layout: Layout) -> GistState:
        """State of one passage from its residual stream ``(L + 1, S, E)``.

        Default: the gist slots, or all tokens when the layout has no gists.
        """
        keep = layout.is_gist if bool(layout.is_gist.any()) else torch.ones_like(layout.is_gist)
        keys, values = self.backbone.project_kv(hidden[:-1, keep.to(hidden.device)])
        offsets = layout.position[keep].to(hidden.device)
        return GistState.uniform(
            keys, values, offsets, span=layout.span, num_tokens=layout.num_tokens
        )

    def finish(self, states: list[GistState], passages: Sequence[Tensor]) -> list[GistState]:
        """Last look at the extracted states of a batch; default: as they are."""
        return states

    def adapted(self, rows: Tensor | None = None) -> AbstractContextManager[None]:
        """What is in force while passages are encoded and gists extracted; default: nothing.

        Args:
            rows: ``(B, S)`` 1 at gists, 0 elsewhere; ``None`` where there are only gists.
        """
        return nullcontext()

    def answer_losses(self, answers: Answers) -> dict[str, Tensor]:
        """Terms of the training loss from what is read, scalars by name.

        Default: ``kl``, reading the gists as the plain model reads the text, and ``ce``, giving the
        answer.
        """
        weights = answers.weights
        return {
            "kl": (distill(answers.teacher, answers.student) * weights).sum(),
            "ce": (cross_entropy(answers.student, answers.targets) * weights).sum(),
        }

    def passage_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """Terms of the training loss from the passages alone, scalars by name; default: none."""
        return {}

    def thought_losses(self, thoughts: Sequence[Thoughts]) -> dict[str, Tensor]:
        """Terms of the training loss from worked answers, scalars by name, for methods that
        compress their own thoughts while they decode.

        Raises:
            BadInput: the method does not do so.
        """
        raise BadInput(f"{self.name} does not compress its own thoughts")

    @property
    def max_tokens(self) -> int:
        """Longest passage that can be compressed, in tokens."""
        return self.backbone.max_positions

    def set_ratio(self, ratio: float, *coarser: float) -> None:
        """Compress at another ratio from now on, perhaps at ``coarser`` ones besides (see
        ``NestedConfig``); the fingerprint changes with it.

        Raises:
            BadInput: the method cannot do that.
        """
        self.configure({"ratio": ratio, **({"coarser": coarser} if coarser else {})})

    def configure(self, settings: Mapping[str, Any]) -> None:
        """Some settings otherwise from now on; a ``ratio`` without ``coarser`` ones stands alone.

        Raises:
            BadInput: a setting that the method does not have, or a value that it refuses.
        """
        given = dict(settings)
        if isinstance(self.config, NestedConfig) and "ratio" in given:
            given.setdefault("coarser", ())
        self.config = make_config(self, {**dict(self.config), **given})

    # ---- the shared path

    def compress(self, passages: Sequence[Tensor]) -> list[GistState]:
        """States of a batch of tokenised passages ``(T_i,)``; differentiable.

        Raises:
            BadInput: a passage without tokens.
            PassageTooLong: a passage that does not fit the model's window.
        """
        for ids in passages:
            if not len(ids):
                raise BadInput("a passage without tokens cannot be compressed")
            if len(ids) > self.max_tokens:
                raise PassageTooLong(
                    f"a passage of {len(ids)} tokens is longer than the {self.max_tokens} that "
                    f"{self.name} can take with {self.backbone.name}; split it first"
                )
        return self.distil(self.encode(passages), passages)

    @property
    def reads_tokens_only(self) -> bool:
        """Whether ``encode`` is a plain forward pass, the same for all methods that say so."""
        return type(self).layout is Compressor.layout and self.embeddings() is None

    def distil(self, hidden: Tensor, passages: Sequence[Tensor]) -> list[GistState]:
        """States from the residual streams ``(L + 1, B, S, E)`` that ``encode`` gave."""
        states = []
        with self.adapted():
            for row, ids in enumerate(passages):
                layout = self.layout(ids)
                states.append(self.extract(hidden[:, row, : len(layout)], layout))
        return self.finish(states, passages)

    def encode(self, passages: Sequence[Tensor], layouts: Sequence[Layout] | None = None) -> Tensor:
        """Residual streams ``(L + 1, B, S, E)`` of right-padded passages.

        Args:
            layouts: where they are not those that ``layout`` gives.
        """
        layouts = layouts or [self.layout(ids) for ids in passages]
        size = max(len(layout) for layout in layouts)
        ids = torch.zeros(len(passages), size, dtype=torch.long)
        source, positions = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (tokens, layout) in enumerate(zip(passages, layouts, strict=True)):
            ids[row, : len(tokens)] = tokens
            source[row, : len(layout)] = layout.source
            positions[row, : len(layout)] = layout.position
        if self.embeddings() is None:
            return self.backbone.encode(ids, positions=positions, layouts=layouts)
        source = source.to(self.backbone.device)
        table = self.backbone.embed(ids)
        tokens_at = source.clamp_min(0)[..., None].expand(-1, -1, table.shape[-1])
        starts = [
            self.gist_inputs(table[row, : len(tokens)], layout)
            for row, (tokens, layout) in enumerate(zip(passages, layouts, strict=True))
        ]
        embedded = table.gather(1, tokens_at).masked_scatter(
            source[..., None] < 0, torch.cat(starts).to(table.dtype)
        )
        with self.adapted((source < 0).float()):
            return self.backbone.encode(
                ids, embeddings=embedded, positions=positions, layouts=layouts
            )

    @torch.no_grad()
    def verbalise(self, states: Sequence[GistState], max_tokens: int = 64) -> list[str]:
        """Each state in words, for models that can only be talked to: what the plain reader writes,
        greedily, when it is asked to write down the text that it reads as gists."""
        backbone = self.backbone
        before, after = framing(WRITE, backbone.render)
        prefix, request = backbone.prefix(backbone.tokenize(before)), backbone.tokenize(after)
        placed = [Placed(state, len(prefix)) for state in states]
        context = Context([prefix] * len(states), compose([[p] for p in placed], backbone))
        texts = [Local.after(request, p.start + p.state.span, 1) for p in placed]
        written = backbone.write(backbone.open(context, texts), max_tokens)
        return [text.strip() for text in written]

    def language_loss(
        self,
        hidden: Tensor,
        passages: Sequence[Tensor],
        layouts: Sequence[Layout],
        given: Sequence[int] | None = None,
    ) -> Tensor:
        """Mean NLL of tokens in the compress pass itself, each told by the slot before it.

        Under the mask of ``layouts`` a token knows earlier units by their gists only, so every
        token of a passage teaches the gists before it. Gists are no targets. Of more than
        ``MAX_LM_TOKENS`` tokens a sample is taken, as every one costs a row of the vocabulary.

        Args:
            hidden: ``(B, S, E)`` residual stream after the last layer.
            given: how many leading tokens are no targets; default: the first one of each.
        """
        rows, targets = [], []
        given = given or [1] * len(passages)
        for row, ids, layout, first in zip(hidden, passages, layouts, given, strict=True):
            slots = (~layout.is_gist).nonzero()[first:, 0]
            rows.append(row[slots - 1])
            targets.append(ids[first:])
        before, target = torch.cat(rows), torch.cat(targets).to(hidden.device)
        if not len(target):
            return hidden.new_zeros(())
        chosen = torch.randperm(len(target))[:MAX_LM_TOKENS].to(hidden.device)
        return cross_entropy(self.backbone.logits(before[chosen]), target[chosen]).mean()

    # ---- identity and persistence

    @property
    def fingerprint(self) -> str:
        """sha256 over name, config and own weights."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode())
        for name, weight in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Name and settings, as saved and shown."""
        return {"compressor": self.name, "settings": self.config.model_dump(mode="json")}

    def save_pretrained(self, folder: Path | str) -> None:
        """Write ``compressor.json`` and, where there are any, its own weights."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if weights := self.state_dict():
            save_file(
                {k: v.contiguous() for k, v in weights.items()}, path / "compressor.safetensors"
            )
        document = {
            "format": FORMAT,
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint,
            "name": self.name,
            "config": self.config.model_dump(mode="json"),
        }
        (path / "compressor.json").write_text(json.dumps(document, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str, backbone: Backbone) -> Self:
        """Read what ``save_pretrained`` wrote, to be used and not to be trained.

        Raises:
            UnknownCompressor: the folder holds another method, or none.
            BadInput: it was trained for another model.
        """
        document = read_document(folder)
        if document["name"] != cls.name:
            raise UnknownCompressor(f"{folder} holds {document['name']!r}, not {cls.name!r}")
        if cls.trained and document["backbone_fingerprint"] != backbone.fingerprint:
            raise BadInput(
                f"{folder} was trained for {document['backbone']}, which is not {backbone.name}"
            )
        compressor = cls(backbone, cls.Config.model_validate(document["config"]))
        weights = Path(folder) / "compressor.safetensors"
        if weights.exists():
            compressor.load_state_dict(load_file(weights))
        compressor.folder = Path(folder).resolve()
        return compressor.to(backbone.device).requires_grad_(False)


class TrainedConfig(CompressorConfig):
    """Settings of methods that learn gist embeddings and an update of the compress pass.

    Attributes:
        lora: the update; it is in force while passages are compressed, never while gists are read.
        adapt: whose rows it changes: those of the ``gists`` (tokens stay exactly the backbone's
            own) or ``all``.
        start: what a gist's embedding is added to: the embedding of the last ``token`` of those
            that it stands for (``Layout.shares``), from which it learns fastest; their ``mean``; or
            nothing (``learned``), as in the papers.
        positions: where gists stand while a passage is encoded: at those of the ``tokens`` that
            they stand for (``Layout.beside_tokens``), or where the ``paper`` has them.
    """

    ratio: float = Field(default=4.0, ge=1.0)
    lora: LoRAConfig = LoRAConfig()
    adapt: Literal["gists", "all"] = "gists"
    start: Literal["token", "mean", "learned"] = "token"
    positions: Literal["tokens", "paper"] = "tokens"


class TrainedCompressor(Compressor):
    """A compressor with gist embeddings and a LoRA of its own."""

    Config: ClassVar[type[CompressorConfig]] = TrainedConfig
    config: TrainedConfig
    trained: ClassVar[bool] = True
    loss_weights: ClassVar[Mapping[str, float]] = {"kl": 1.0, "ce": 0.2}

    def __init__(self, backbone: Backbone, config: CompressorConfig | None = None) -> None:
        super().__init__(backbone, config)
        table = backbone.model.get_input_embeddings().weight.detach().float()
        mean, spread = table.mean(0), table.std(0)
        noise = torch.randn(self.num_embeddings, len(mean), device=table.device)
        alone = self.config.start == "learned"
        self.gists = nn.Parameter((mean + 0.1 * spread * noise) * alone)
        self.lora = LoRA(backbone, self.config.lora)

    @property
    def num_embeddings(self) -> int:
        """How many different gist embeddings there are; default: one for all gists."""
        return 1

    @property
    def max_tokens(self) -> int:
        longest = super().max_tokens
        if self.config.positions == "tokens":
            return longest
        return int(longest * self.config.ratio / (self.config.ratio + 1))  # gists take some, too

    def embeddings(self) -> Tensor | None:
        return self.gists

    def placed(self, layout: Layout) -> Layout:
        """The layout of a paper, with gists where ``positions`` has them."""
        return layout.beside_tokens() if self.config.positions == "tokens" else layout

    def gist_inputs(self, tokens: Tensor, layout: Layout) -> Tensor:
        learned, start = super().gist_inputs(tokens, layout), self.config.start
        if start == "learned":
            return learned
        first, end = (place.to(tokens.device) for place in layout.shares)
        if start == "token":
            return learned + tokens[(end - 1).clamp_min(0)].to(learned.dtype)
        place = torch.arange(len(tokens), device=tokens.device)
        owner = torch.searchsorted(end, place, right=True).clamp_max(len(end) - 1)
        theirs = (place >= first[owner]) & (place < end[owner])
        sums = torch.zeros_like(learned).index_add(
            0, owner[theirs], tokens[theirs].to(learned.dtype)
        )
        return learned + sums / (end - first).clamp_min(1)[:, None]

    def passage_losses(self, lesson: Lesson) -> dict[str, Tensor]:
        """``lm`` (``language_loss``) for methods that weigh it."""
        if "lm" not in self.loss_weights:
            return {}
        layouts = [self.layout(ids) for ids in lesson.passages]
        return {"lm": self.language_loss(lesson.hidden[-1], lesson.passages, layouts)}

    def adapted(self, rows: Tensor | None = None) -> AbstractContextManager[None]:
        return self.lora.active(rows if self.config.adapt == "gists" else None)


def make_config(
    method: Compressor | type[Compressor], settings: Mapping[str, Any]
) -> CompressorConfig:
    """A method's settings, checked.

    Raises:
        BadInput: a setting that the method does not have, or a value that it refuses.
    """
    try:
        return method.Config.model_validate(settings)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given: {e['input']!r})"
            for e in error.errors()
        )
        raise BadInput(f"settings of {method.name}: {faults}") from error


def ratio_settings(ratio: float | Sequence[float] | None) -> dict[str, Any]:
    """Settings for a ratio, for several with the finest first, or for none in particular.

    Raises:
        BadInput: several, but none of them.
    """
    if ratio is None:
        return {}
    if isinstance(ratio, str) or not isinstance(ratio, Iterable):
        return {"ratio": ratio}
    if not (ratios := [*ratio]):
        raise BadInput("ratio is empty; give a number, or several with the finest first")
    finest, *coarser = ratios
    return {"ratio": finest, "coarser": coarser} if coarser else {"ratio": finest}


def nested(levels: Sequence[GistState]) -> GistState:
    """One passage at several ratios, the finest first, as one state."""
    return replace(levels[0], coarser=tuple(levels[1:]))


def best_slots(scores: Tensor, ratio: float, pools: int) -> Tensor:
    """The best of the slots that share a budget.

    Args:
        scores: ``(L * H, T)``.
        ratio: tokens per kept slot, on average over those that share.
        pools: budgets: 1 for one that all share, ``L`` for one per layer, ``L * H`` per head.

    Returns:
        ``(L * H, T)`` bool.
    """
    flat = scores.reshape(pools, -1)
    budget = min(max(1, round(flat.shape[1] / ratio)), flat.shape[1])
    keep = torch.zeros_like(flat, dtype=torch.bool)
    return keep.scatter_(1, flat.topk(budget).indices, True).view_as(scores)


def read_document(folder: Path | str) -> dict[str, Any]:
    """``compressor.json`` of a folder.

    Raises:
        UnknownCompressor: there is none, or it cannot be read.
    """
    path = Path(folder) / "compressor.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        known = document["format"] <= FORMAT and "name" in document
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnknownCompressor(f"{path} is no compressor description: {error}") from error
    if not known:
        raise UnknownCompressor(f"{path} was written by a newer gist-rag")
    return document
