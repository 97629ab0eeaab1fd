"""The one room that knows Hugging Face anatomy.

A ``Backbone`` borrows a causal LM: it never trains, saves or forks it. Two facts carry everything:

- Hidden states of chosen slots, sent through a layer's own norm and k/v projections, *are* that
  layer's keys and values before RoPE, so gists are read off an ordinary forward pass (``encode``,
  ``project_kv``).
- transformers hands unknown keyword arguments down to a registered attention function, so gists
  reach attention as an argument (``slots=``) of an ordinary forward pass (``read``, ``decode``).
"""

from __future__ import annotations

import hashlib
import re
import threading
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gist_rag.attention import ATTENTION, Reading, kernels_of
from gist_rag.constrain import Follower, Grammars
from gist_rag.errors import BadInput, ContextOverflow, UnsupportedBackbone
from gist_rag.layout import Layout, Slots, Visibility
from gist_rag.mixture import Mixture
from gist_rag.sampling import Chooser
from gist_rag.types import Sampling
from gist_rag_kernels import choose, rotate

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


_SPELLING = {ord("\u0120"): " ", ord("\u2581"): " ", ord("\u010a"): "\n"}
"""How byte-level BPE and SentencePiece write white space in a token."""


@dataclass(frozen=True)
class Prefix:
    """KV of a text that starts a prompt: exact, after RoPE at positions ``0..P-1``.

    ``keys`` and ``values`` are ``(L, H, P, D)``.
    """

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[2]

    def padded(self, width: int) -> Prefix:
        """The same with zeros before it, ``width`` positions in all."""
        margin = (0, 0, width - len(self), 0)
        return Prefix(nn.functional.pad(self.keys, margin), nn.functional.pad(self.values, margin))


@dataclass(frozen=True)
class Context:
    """Everything that stands before the text still to be read, for a batch of prompts.

    Attributes:
        prefixes: exact KV of the leading text, one per prompt.
        slots: composed gists, or ``None`` when no prompt has any.
    """

    prefixes: Sequence[Prefix]
    slots: Slots | None


@dataclass(frozen=True)
class Local:
    """Tokens of one prompt that are read at query time.

    Attributes:
        ids: ``(Q,)``.
        positions: ``(Q,)``, rising; they jump where a passage stands.
        seen: ``(Q,)`` how many of the prompt's passages come before each token.
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor

    @classmethod
    def after(cls, ids: Tensor, start: int, num_passages: int) -> Local:
        """A text that stands behind all passages, from position ``start`` on."""
        return cls(ids, start + torch.arange(len(ids)), torch.full_like(ids, num_passages))

    @classmethod
    def join(cls, texts: Sequence[Local]) -> Local:
        """Texts that are read in one pass."""
        return cls(
            torch.cat([t.ids for t in texts]),
            torch.cat([t.positions for t in texts]),
            torch.cat([t.seen for t in texts]),
        )


class Adapter(Protocol):
    """Changes what a backbone computes while it answers; never while it encodes passages."""

    def rows(self, input_ids: Tensor) -> Tensor:
        """``(Q,)``, 1 for each token of the last text of a prompt that is read with the change."""
        ...

    def active(self, rows: Tensor | None) -> AbstractContextManager[None]:
        """The change is in force inside, for ``rows`` ``(B, Q)``."""
        ...


class Backbone:
    """A frozen causal LM that can be read with gists.

    Args:
        model: a transformers causal LM of a supported family; its attention implementation is set
            to one that equals SDPA wherever no gists are given.
        tokenizer: its tokenizer.
        name: how users call the model.

    Attributes:
        lock: held during every forward pass, and by whoever changes for a while what one computes.

    Raises:
        UnsupportedBackbone: the model's attention cannot read gists; says why.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str = "") -> None:
        why = reason_against(model)
        if why:
            raise UnsupportedBackbone(
                f"{name or type(model).__name__} cannot read gists: {why}. "
                f"Supported families: {', '.join(SUPPORTED)}"
            )
        self.model = model.eval().requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        self.tokenizer = tokenizer
        self.name = name or str(getattr(model.config, "_name_or_path", ""))
        self.lock = threading.RLock()
        self._angles = (torch.empty(0), torch.empty(0))

        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_query_heads: int = config.num_attention_heads
        self.num_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        self.max_positions: int = config.max_position_embeddings
        self.scaling: float = self.layers[0].self_attn.scaling

    @property
    def layers(self) -> Sequence[Any]:
        layers: Sequence[Any] = self.model.model.layers
        return layers

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = self.model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id) if i is not None)

    @cached_property
    def grammars(self) -> Grammars:
        """Constraints of answers, compiled for this tokenizer."""
        return Grammars(self.tokenizer, self.stop_ids)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, weights (a sample of every tensor), tokenizer and chat template."""
        digest = hashlib.sha256()
        for name, weight in self.model.named_parameters():
            step = max(1, weight.numel() // 256)
            sample = weight.detach().reshape(-1)[::step].to("cpu", torch.bfloat16)
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(sample.contiguous().view(torch.int16).numpy().tobytes())
        digest.update(str(self.model.config.rope_parameters).encode())
        digest.update(str(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(str(getattr(self.tokenizer, "chat_template", None)).encode())
        return digest.hexdigest()

    def tokenize(self, text: str) -> Tensor:
        """``(T,)`` token ids of a piece of a prompt, without special tokens of its own."""
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        return torch.as_tensor(ids, dtype=torch.long)

    def plain(self, text: str) -> str:
        """A piece of a prompt without special tokens, such as those of a chat template."""
        plain: str = self.tokenizer.decode(self.tokenize(text), skip_special_tokens=True)
        return plain.strip()

    def breaks(self, input_ids: Tensor, pattern: str) -> list[int]:
        """Exclusive ends of the tokens ``(T,)`` in which matches of a pattern end, rising.

        Args:
            pattern: a regular expression; of the text, ASCII alone is spelt as it was.
        """
        spelt = self.tokenizer.convert_ids_to_tokens(input_ids.tolist())
        pieces = [t.translate(_SPELLING) for t in spelt]
        ends = list(accumulate(map(len, pieces)))
        found = re.finditer(pattern, "".join(pieces))
        return sorted({bisect_left(ends, match.end()) + 1 for match in found})

    def render(self, messages: Sequence[Any], tools: Sequence[Any] | None = None) -> str:
        """The prompt that the model's chat template makes of messages."""
        if not getattr(self.tokenizer, "chat_template", None):
            return "\n\n".join(str(m["content"]) for m in messages) + "\n"
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates raise jinja2 errors of their own for odd role orders
            raise BadInput(
                f"the chat template of {self.name} refuses these messages: {error}"
            ) from error
        return text

    @cached_property
    def opening(self) -> str:
        """What the chat template writes before an answer; empty without a template."""
        if not getattr(self.tokenizer, "chat_template", None):
            return ""
        message = [{"role": "user", "content": "Hello"}]
        told: str = self.tokenizer.apply_chat_template(message, tokenize=False)
        return self.render(message)[len(told) :]

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template writes tools into a prompt."""
        name, schema = "gist_rag_probe", {"type": "object", "properties": {}}
        function = {"name": name, "description": "", "parameters": schema}
        messages = [{"role": "user", "content": "Hello"}]
        return name in self.render(messages, [{"type": "function", "function": function}])

    # ---- encoding

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings ``(..., E)`` of token ids ``(...)``."""
        table: Tensor = self.model.get_input_embeddings()(input_ids.to(self.device))
        return table

    def encode(
        self,
        input_ids: Tensor,
        *,
        embeddings: Tensor | None = None,
        layouts: Sequence[Layout] | None = None,
        positions: Tensor | None = None,
        log_beta: Tensor | None = None,
    ) -> Tensor:
        """Residual stream of passages encoded alone.

        Args:
            input_ids: ``(B, S)``, right-padded; ignored where ``embeddings`` are given.
            embeddings: ``(B, S, E)`` input embeddings.
            layouts: who sees whom in each passage; default: causal.
            positions: ``(B, S)``; default ``0..S-1``.
            log_beta: ``(L, B, H, S)`` how much of a key's weight each later token leaves, causal
                passes only; default: all.

        Returns:
            ``(L + 1, B, S, E)``: the input of each layer, then the last layer's output before the
            final norm.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids.to(self.device)}
        if embeddings is not None:
            arguments = {"inputs_embeds": embeddings}
        if layouts and not all(layout.is_causal for layout in layouts):
            arguments |= self._rule(layouts, input_ids.shape[1])
        if log_beta is not None:
            arguments["log_beta"] = log_beta
        if positions is None:
            positions = torch.arange(input_ids.shape[1])[None]
        stream: list[Tensor] = []
        with self.lock, _recorded(self.layers, stream):
            self.model.model(**arguments, position_ids=positions.to(self.device), use_cache=False)
        return torch.stack(stream)

    def _rule(self, layouts: Sequence[Layout], size: int) -> dict[str, Any]:
        """Who sees whom, as attention is told: for a kernel by the layouts, else by a mask."""
        visibility = Visibility.of(layouts, size, self.device)
        if choose(visibility.is_gist) == "triton":
            return {"visibility": visibility.shifted()}
        itself = torch.eye(size, dtype=torch.bool, device=self.device)  # so padding sees something
        return {"attention_mask": (visibility.mask() | itself)[:, None]}

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """The list gets the residual stream of the pass that is made inside, ``L + 1`` items."""
        stream: list[Tensor] = []
        with self.lock, _recorded(self.layers, stream):
            yield stream

    def normed(self, hidden: Tensor) -> Tensor:
        """What the layers' attention gets of their inputs ``(L, ..., E)``."""
        layers = zip(self.layers, hidden, strict=True)
        return torch.stack([layer.input_layernorm(states) for layer, states in layers])

    def project_kv(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE and values of residual streams.

        Args:
            hidden: ``(L, ..., N, E)`` inputs of the layers.

        Returns:
            Keys and values ``(L, ..., H, N, D)``.
        """
        keys, values = [], []
        for layer, states in zip(self.layers, hidden, strict=True):
            attention, states = layer.self_attn, layer.input_layernorm(states)
            shape = (*states.shape[:-1], -1, self.head_dim)
            key = attention.k_proj(states).view(shape)
            key = attention.k_norm(key) if hasattr(attention, "k_norm") else key
            keys.append(key.transpose(-2, -3))
            values.append(attention.v_proj(states).view(shape).transpose(-2, -3))
        return torch.stack(keys), torch.stack(values)

    def project_queries(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Queries after RoPE, grouped by the KV head that they read.

        Args:
            hidden: ``(L, B, Q, E)`` inputs of the layers.
            positions: ``(B, Q)``.

        Returns:
            ``(L, B, H, G * Q, D)`` for groups of ``G`` query heads.
        """
        cos, sin = self.rotary(positions)  # (B, Q, D)
        queries = []
        for layer, states in zip(self.layers, hidden, strict=True):
            attention, states = layer.self_attn, layer.input_layernorm(states)
            query = attention.q_proj(states).view(*states.shape[:-1], -1, self.head_dim)
            query = attention.q_norm(query) if hasattr(attention, "q_norm") else query
            query = rotate(query.float(), cos[:, :, None], sin[:, :, None])
            grouped = query.transpose(1, 2).unflatten(1, (self.num_heads, -1))  # (B, H, G, Q, D)
            queries.append(grouped.flatten(2, 3))
        return torch.stack(queries)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The model's own cos and sin ``(..., D)`` in float32 at integer positions ``(...)``."""
        flat = positions.reshape(1, -1).to(self.device)
        carrier = torch.zeros(1, dtype=torch.float32, device=self.device)
        cos, sin = self.model.model.rotary_emb(carrier, position_ids=flat)
        shape = (*positions.shape, self.head_dim)
        return cos.view(shape), sin.view(shape)

    def angles(self, count: int) -> tuple[Tensor, Tensor]:
        """The same, ``(n, D / 2)`` of all positions below ``count`` or more, kept in memory: both
        halves of a head turn alike."""
        known = self._angles
        if len(known[0]) < count:
            every = torch.arange(max(1024, 1 << (count - 1).bit_length()))
            cos, sin = (x[:, : self.head_dim // 2].contiguous() for x in self.rotary(every))
            known = self._angles = cos, sin
        return known  # not what another thread may have put there

    def prefix(self, input_ids: Tensor) -> Prefix:
        """Exact KV of leading text ``(P,)``; an empty text gives an empty prefix."""
        if not len(input_ids):
            empty = torch.zeros(
                self.num_layers,
                self.num_heads,
                0,
                self.head_dim,
                dtype=self.dtype,
                device=self.device,
            )
            return Prefix(empty, empty)
        cache = DynamicCache(config=self.model.config)
        with self.lock, torch.no_grad():
            self.model.model(
                input_ids=input_ids[None].to(self.device), past_key_values=cache, use_cache=True
            )
        return Prefix(
            torch.stack([layer.keys[0] for layer in cache.layers]),
            torch.stack([layer.values[0] for layer in cache.layers]),
        )

    # ---- reading

    def read(
        self,
        context: Context,
        texts: Sequence[Local],
        *,
        num_logits: int = 0,
        mask: Tensor | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Logits of texts read after a context; differentiable.

        Args:
            texts: one per prompt, left-padded to the longest.
            num_logits: rows wanted from the end; 0 for all.
            mask: ``(B, 1, Q, P + Q)`` bool over prefix and text, where causal is not wanted.

        Returns:
            ``(B, Q or num_logits, V)``, right-aligned.
        """
        step = self._start(context, texts, adapter)
        if mask is not None:
            step = replace(step, visible=mask.to(self.device))
        return self._forward(step, num_logits)

    def trace(self, context: Context, texts: Sequence[Local]) -> tuple[Tensor, Tensor]:
        """Residual stream of texts read after a context.

        Returns:
            ``(L + 1, B, Q, E)`` as in ``encode`` and positions ``(B, Q)``, left-padded as in
            ``read``.
        """
        stream: list[Tensor] = []
        step = self._start(context, texts)
        with self.lock, _recorded(self.layers, stream):
            self._hidden(step)
        return torch.stack(stream), step.positions

    def logits(self, residual: Tensor) -> Tensor:
        """Logits ``(..., V)`` of the residual stream ``(..., E)`` after the last layer."""
        logits: Tensor = self.model.lm_head(self.model.model.norm(residual))
        return logits

    @torch.no_grad()
    def decode(
        self,
        context: Context,
        texts: Sequence[Local],
        sampling: Sequence[Sampling],
        adapter: Adapter | None = None,
    ) -> Generator[list[int | None], set[int] | None]:
        """Generate for a batch of prompts, one list of new tokens per step.

        A row yields its end token as its last one and ``None`` afterwards; the generator ends when
        every row has ended or reached its ``max_tokens``. A caller that has enough of some rows
        sends their indices: ``steps.send({0, 2})``. Tokens that a constraint leaves no choice about
        are read together, in one forward pass with the first that is chosen again.

        Raises:
            ContextOverflow: a prompt with its answer needs more positions than the model has.
        """
        self.check_window(texts, sampling)
        yield from self.go_on(self.open(context, texts, adapter), sampling)

    @torch.no_grad()
    def open(
        self,
        context: Context,
        texts: Sequence[Local],
        adapter: Adapter | None = None,
        mixture: Mixture | None = None,
        counts: Sequence[int] | None = None,
    ) -> Opened:
        """Read a batch of prompts up to their first token.

        Args:
            mixture: which prompts answer together; default: each for itself.
            counts: of how many tokens of each text's end the likelihood is wanted. Neither its
                first token is judged, since none of it stands before, nor what an adapter reads:
                it has learnt what comes after that.
        """
        step = self._start(context, texts, adapter)
        hidden = self._hidden(step)
        return Opened(
            step,
            self._logits(hidden, 1),
            mixture or Mixture.of_one_each(len(texts), self.device),
            None if counts is None else self._likelihoods(hidden, step, texts, counts),
        )

    def _likelihoods(
        self, hidden: Tensor, step: _Step, texts: Sequence[Local], counts: Sequence[int]
    ) -> Tensor:
        """``(B,)`` log-likelihoods of the ends of texts, from the last hidden states
        ``(B, Q, E)``; see ``open``."""
        sums = []
        adapted, size = step.adapted.count_nonzero(1).tolist(), step.ids.shape[1]
        for row, text in enumerate(texts):
            ids = step.ids[row]
            first = size - min(counts[row], len(text.ids) - 1)
            end = max(first, size - adapted[row])
            logits = self.model.lm_head(hidden[row, first - 1 : end - 1]).float()
            sums.append(-nn.functional.cross_entropy(logits, ids[first:end], reduction="sum"))
        return torch.stack(sums)

    @torch.no_grad()
    def go_on(
        self, opened: Opened, sampling: Sequence[Sampling]
    ) -> Generator[list[int | None], set[int] | None]:
        """``decode`` from where ``open`` left off; once only. Rows are those of the mixture."""
        choosers = [Chooser(s, self.device, self._follower(s)) for s in sampling]
        state, logits, mixture = opened.step, opened.logits, opened.mixture
        scores = mixture(logits[:, -1])
        unread: list[list[int]] = []  # tokens of each step since the last forward pass
        done: set[int] = set()
        for step in range(max(s.max_tokens for s in sampling)):
            done |= {row for row, s in enumerate(sampling) if step >= s.max_tokens}
            going = [choosers[row] for row in range(len(sampling)) if row not in done]
            if unread and not all(choose.knows_next for choose in going):
                said = torch.tensor(unread, device=self.device).T  # (B, n)
                mixture.tell(logits[:, -1:], said[:, :1])
                state = state.append(said[mixture.owner])
                logits, unread = self._forward(state, said.shape[1]), []
                mixture.tell(logits[:, :-1], said[:, 1:])
                scores = mixture(logits[:, -1])
            tokens = [
                None if row in done else choose(scores[row]) for row, choose in enumerate(choosers)
            ]
            done |= {row for row, token in enumerate(tokens) if token in self.stop_ids}
            done |= (yield tokens) or set()
            if len(done | {r for r, s in enumerate(sampling) if step + 1 >= s.max_tokens}) == len(
                sampling
            ):
                return
            unread.append([self._filler if token is None else token for token in tokens])

    def write(self, opened: Opened, max_tokens: int) -> list[str]:
        """What is decoded greedily, one text per prompt."""
        written: list[list[int]] = [[] for _ in opened.mixture.sizes]
        for step in self.go_on(opened, [Sampling(max_tokens=max_tokens)] * len(written)):
            for tokens, token in zip(written, step, strict=True):
                if token is not None:
                    tokens.append(token)
        return [str(self.tokenizer.decode(t, skip_special_tokens=True)) for t in written]

    def extend(
        self,
        cache: DynamicCache,
        positions: Tensor,
        *,
        input_ids: Tensor | None = None,
        embeddings: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(V,)`` after the last of some more slots, whose KV goes into a cache.

        Unlike ``decode`` it leaves the cache to its caller, who may drop entries between calls:
        positions need not be places in the cache.

        Args:
            cache: of one sequence; changed in place.
            positions: ``(Q,)``.
            input_ids: ``(Q,)`` tokens, or
            embeddings: ``(Q, E)`` what stands in their place.
            mask: ``(Q, K + Q)`` bool, or ``None`` for causal.
        """
        arguments: dict[str, Any] = {}
        if input_ids is not None:
            arguments["input_ids"] = input_ids[None].to(self.device)
        if embeddings is not None:
            arguments["inputs_embeds"] = embeddings[None]
        if mask is not None:
            arguments["attention_mask"] = mask[None, None].to(self.device)
        with self.lock:
            out = self.model(
                **arguments,
                position_ids=positions[None].to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[0, -1]
        return logits

    def _follower(self, sampling: Sampling) -> Follower | None:
        if sampling.constraint is None:
            return None
        return self.grammars.follow(sampling.constraint)

    @property
    def _filler(self) -> int:
        return min(self.stop_ids, default=0)

    def check_window(self, texts: Sequence[Local], sampling: Sequence[Sampling]) -> None:
        """Refuse what cannot be read and answered.

        Raises:
            ContextOverflow: a prompt with its answer needs more positions than the model has.
        """
        rows = zip(texts, sampling, strict=True)
        needed = max(int(text.positions[-1]) + 1 + s.max_tokens for text, s in rows)
        if needed > self.max_positions:
            raise ContextOverflow(
                f"prompt and answer take {needed} positions, {self.name} has "
                f"{self.max_positions}; retrieve fewer passages or lower max_tokens"
            )

    def _start(
        self, context: Context, texts: Sequence[Local], adapter: Adapter | None = None
    ) -> _Step:
        """First step of a reading: prefixes and texts padded left, prefix KV in a fresh cache."""
        size, width = max(len(t.ids) for t in texts), max(len(p) for p in context.prefixes)
        ids = torch.full((len(texts), size), self._filler)
        positions, seen = torch.zeros_like(ids), torch.zeros_like(ids)
        visible = torch.ones(len(texts), width + size, dtype=torch.bool)
        adapted = torch.zeros(ids.shape)
        for row, (prefix, text) in enumerate(zip(context.prefixes, texts, strict=True)):
            pad = size - len(text.ids)
            visible[row, : width - len(prefix)] = False
            visible[row, width : width + pad] = False
            ids[row, pad:], positions[row, pad:], seen[row, pad:] = (
                text.ids,
                text.positions,
                text.seen,
            )
            if adapter is not None:
                adapted[row, pad:] = adapter.rows(text.ids)
        reading = None
        if context.slots is not None:
            everything = bool((seen > context.slots.order.max().cpu()).all())
            reading = Reading.of(context.slots, None if everything else seen.to(self.device))
        return _Step(
            ids.to(self.device),
            positions.to(self.device),
            None if bool(visible.all()) else visible.to(self.device),
            self._cache(context.prefixes, width),
            reading,
            adapter,
            adapted.to(self.device),
        )

    def _cache(self, prefixes: Sequence[Prefix], width: int) -> DynamicCache:
        """A fresh cache that holds the prefixes, padded left to ``width``."""
        cache = DynamicCache(config=self.model.config)
        if width:
            keys = torch.stack([p.padded(width).keys for p in prefixes], dim=1)  # (L, B, H, P, D)
            values = torch.stack([p.padded(width).values for p in prefixes], dim=1)
            for index in range(self.num_layers):
                cache.update(keys[index], values[index], index)
        return cache

    def _forward(self, step: _Step, num_logits: int) -> Tensor:
        return self._logits(self._hidden(step), num_logits)

    def _logits(self, hidden: Tensor, count: int) -> Tensor:
        # contiguous: torch would copy the vocabulary's weights for each prompt of a strided batch
        logits: Tensor = self.model.lm_head(hidden[:, -count:].contiguous())
        return logits

    def _hidden(self, step: _Step) -> Tensor:
        """``(B, Q, E)`` after the last norm."""
        arguments: dict[str, Any] = {}
        if step.visible is not None:
            arguments["attention_mask"] = step.visible
        if step.reading is not None:
            arguments["slots"] = step.reading
        with self.lock, step.adapter.active(step.adapted) if step.adapter else nullcontext():
            hidden: Tensor = self.model.model(
                input_ids=step.ids,
                position_ids=step.positions,
                past_key_values=step.cache,
                use_cache=True,
                **arguments,
            ).last_hidden_state
        return hidden


@dataclass(frozen=True)
class _Step:
    """Input of one forward pass: ``ids`` and ``positions`` ``(B, Q)``; ``visible`` ``(B, K)``
    or ``(B, 1, Q, K)`` bool over prefix and text, ``None`` for causal without padding; ``adapted``
    ``(B, Q)``, 1 where the adapter is in force."""

    ids: Tensor
    positions: Tensor
    visible: Tensor | None
    cache: DynamicCache
    reading: Reading | None
    adapter: Adapter | None
    adapted: Tensor

    def select(self, rows: Tensor, slots: Slots | None) -> _Step:
        """Of some rows, once they have been read: their text is in the cache."""
        self.cache.batch_select_indices(rows)
        return _Step(
            self.ids[rows],
            self.positions[rows],
            None if self.visible is None else self.visible[rows],
            self.cache,
            None if slots is None else Reading.of(slots, None),
            self.adapter,
            self.adapted[rows],
        )

    def append(self, ids: Tensor) -> _Step:
        """The next step: tokens ``(B, Q)``, which see everything before them."""
        visible, count = self.visible, ids.shape[1]
        if visible is not None:
            visible = nn.functional.pad(visible, (0, count), value=True)
        reading = None if self.reading is None else replace(self.reading, seen=None)
        ahead = torch.arange(1, count + 1, device=ids.device)
        return _Step(
            ids,
            self.positions[:, -1:] + ahead,
            visible,
            self.cache,
            reading,
            self.adapter,
            self.adapted[:, -1:].expand(-1, count),
        )


@dataclass(frozen=True)
class Opened:
    """Prompts that have been read and wait for their first token.

    Attributes:
        logits: ``(R, 1, V)`` of the first tokens.
        mixture: which of the ``R`` prompts answer together.
        likelihoods: ``(R,)`` of the ends of the texts, where they were wanted.
    """

    step: _Step
    logits: Tensor
    mixture: Mixture
    likelihoods: Tensor | None = None

    def select(self, rows: Sequence[int], slots: Slots | None, mixture: Mixture) -> Opened:
        """Some of the prompts, to go on with; the others cannot be gone on with any more.

        Args:
            slots: composed gists of these prompts.
        """
        chosen = torch.tensor(rows, device=self.logits.device)
        return Opened(self.step.select(chosen, slots), self.logits[chosen], mixture)

    @property
    def kernels(self) -> str:
        """What reads the gists: ``triton`` or ``reference``."""
        reading = self.step.reading
        return "reference" if reading is None else kernels_of(reading.slots)

    @property
    def entropy(self) -> Tensor:
        """``(B,)`` of the answers' first tokens, in nats."""
        logs = self.mixture(self.logits[:, 0]).float().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)


def forget(cache: DynamicCache, first: int, last: int) -> None:
    """Drop entries ``first`` to ``last`` (exclusive) of a cache, in every layer and head."""
    for layer in cache.layers:
        layer.keys = torch.cat((layer.keys[:, :, :first], layer.keys[:, :, last:]), dim=2)
        layer.values = torch.cat((layer.values[:, :, :first], layer.values[:, :, last:]), dim=2)


@contextmanager
def _recorded(layers: Sequence[Any], stream: list[Tensor]) -> Iterator[None]:
    """Append each layer's input, then the last layer's output, to ``stream``.

    ``output_hidden_states`` of transformers gives the last one after the final norm, which no
    layer projection can use.
    """

    def enter(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        stream.append(args[0] if args else kwargs["hidden_states"])

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        stream.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def reason_against(model: Any) -> str | None:
    """Why a model cannot be read with gists, or ``None`` if it can."""
    config = model.config
    family = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    layers = getattr(getattr(model, "model", None), "layers", None)
    if layers is None:
        return f"family {family!r} keeps its layers elsewhere than model.model.layers"
    attention = getattr(layers[0], "self_attn", None)
    if hasattr(attention, "kv_a_proj_with_mqa") or hasattr(attention, "kv_b_proj"):
        return "multi-head latent attention has no per-head keys to keep"
    if hasattr(attention, "qkv_proj") or hasattr(attention, "query_key_value"):
        return "its query, key and value projections are fused into one"
    if not hasattr(model.model, "rotary_emb"):
        return "it has learned or no position embeddings, so keys cannot be moved"
    if family not in SUPPORTED:
        return f"family {family!r} has not been checked"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    sliding = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if kinds != {"full_attention"} or (sliding and family == "mistral"):
        return "sliding-window layers drop what gists stand for"
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        return f"RoPE type {rope['rope_type']!r} depends on the length of the prompt"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "only a part of each head is rotated"
    return None
