"""Attention over gist slots and local tokens: what transformers calls in every layer.

transformers hands keyword arguments of a model's forward pass down to a registered attention
function, so composed gists travel as ``slots=``, what a compress pass may see as ``visibility=``,
and the decay of keys as ``log_beta=``. Without them the function is SDPA, or flash-attn's where
that is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gist_rag.layout import Slots, Visibility
from gist_rag_kernels import (
    Plan,
    RaggedSlots,
    choose,
    flash_for,
    gist_attention,
    plan_layers,
    ragged_slot_attention,
    retention_attention,
    slot_attention,
)

ATTENTION = "gist_rag"
MANY = 10
"""Entries from which on a bank is read with a temperature of its own."""


def kernels_of(slots: Slots) -> str:
    """What reads these slots: ``triton`` or ``reference``."""
    return "reference" if slots.bank is not None else choose(slots.keys)


@dataclass(frozen=True)
class Reading:
    """What one forward pass reads besides its own tokens.

    Attributes:
        slots: composed gists of all layers.
        seen: ``(B, Q)`` passages that come before each query token; ``None`` where all do.
        plans: how a kernel splits the slots of each layer; empty where plain torch reads.
    """

    slots: Slots
    seen: Tensor | None = None
    plans: Sequence[Plan] = ()

    @classmethod
    def of(cls, slots: Slots, seen: Tensor | None) -> Self:
        """Made once for all layers and all tokens of an answer."""
        split = kernels_of(slots) == "triton"
        return cls(slots, seen, plan_layers(slots.starts, slots.lengths) if split else ())


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slots: Reading | None = None,
    visibility: Visibility | None = None,
    log_beta: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention.

    Args:
        query: ``(B, Hq, Q, D)``.
        key, value: ``(B, H, K, D)`` of the local tokens.
        attention_mask: ``(B, 1, Q, K)`` bool over the local tokens, or ``None`` for causal.
        visibility: who sees whom, instead of a mask.
        log_beta: ``(L, B, H, K)`` decay per token of the local keys' weight, all layers.

    Returns:
        ``(B, Q, Hq, D)`` and ``None``, as transformers expects.
    """
    if log_beta is not None:
        assert slots is None, "slots do not fade"
        assert attention_mask is None, "decay reads causally"
        faded = retention_attention(
            query,
            key,
            value,
            log_beta[int(module.layer_idx)],  # type: ignore[arg-type]
            scaling=scaling,
        )
        return faded.transpose(1, 2).contiguous(), None
    if visibility is not None:
        assert slots is None, "a passage with gists is read alone"
        seen = gist_attention(
            query,
            key,
            value,
            visibility.is_gist,
            visibility.local_from,
            visibility.gist_from,
            visibility.prefix,
            scaling=scaling,
            shift=visibility.shift,
        )
        return seen.transpose(1, 2).contiguous(), None
    if slots is None and attention_mask is None and (flash := flash_for(query)):
        rows = (x.transpose(1, 2) for x in (query, key, value))
        return flash(*rows, softmax_scale=scaling, causal=True), None
    if slots is None:
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    if slots.slots.bank is not None:
        local: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )[0]
        return local + read_bank(slots, layer, query, scaling).transpose(1, 2), None
    if slots.plans and not torch.is_grad_enabled():
        out = _ragged(slots, layer, query, key, value, attention_mask, scaling)
    else:
        out = _padded(slots, layer, query, key, value, attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


def _ragged(
    reading: Reading,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scaling: float,
) -> Tensor:
    """Each head reads its own slots and no padding."""
    slots = reading.slots
    return ragged_slot_attention(
        query,
        key,
        value,
        RaggedSlots(
            keys=slots.keys,
            values=slots.values,
            bias=slots.bias,
            order=slots.order,
            starts=slots.starts[layer],
            lengths=slots.lengths[layer],
        ),
        scaling,
        visible=visible,
        seen=reading.seen,
        plan=reading.plans[layer],
    )


def _padded(
    reading: Reading,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor | None,
    scaling: float,
) -> Tensor:
    """Heads padded to one width: what SDPA can take, and differentiate."""
    rows, keys = query.shape[2], key.shape[2]
    if visible is None:
        visible = torch.ones(rows, keys, dtype=torch.bool, device=key.device).tril(keys - rows)
        visible = visible[None, None]
    itself = torch.eye(rows, keys, dtype=torch.bool, device=key.device).roll(keys - rows, 1)
    hidden = ~(visible | itself)  # padding sees itself, so that no softmax is empty
    local = torch.zeros(1, device=key.device).masked_fill(hidden, -torch.inf)
    local = local.expand(*key.shape[:2], -1, -1)
    read = []
    for part in reading.slots.rows(layer):
        bias = part.visible_bias(reading.seen).expand(-1, -1, rows, -1)
        read.append(
            slot_attention(
                query[part.rows],
                torch.cat((part.keys, key[part.rows]), dim=2),
                torch.cat((part.values, value[part.rows]), dim=2),
                torch.cat((bias, local[part.rows]), dim=-1),
                scaling,
            )
        )
    return torch.cat(read) if len(read) > 1 else read[0]


def read_bank(reading: Reading, layer: int, query: Tensor, scaling: float) -> Tensor:
    """What a softmax of its own reads from a bank, ``(B, Hq, Q, D)``; see ``Slots.bank``."""
    slots = reading.slots
    if slots.bank is None or not any(slots.widths[layer]):
        return torch.zeros_like(query)
    read = []
    for part in slots.rows(layer):
        keys, values = part.keys.float(), part.values.float()  # (b, H, N, D)
        grouped = query[part.rows].float().unflatten(1, (slots.heads, -1))  # (b, H, G, Q, D)
        logits = grouped @ keys[:, :, None].mT * scaling
        logits = logits + part.visible_bias(reading.seen)[:, :, None]
        few = slots.lengths[layer, part.rows] < MANY
        temperature = torch.where(few, 1.0, slots.bank)  # (b, H)
        logits = logits / temperature[..., None, None, None]
        share = nn.functional.pad(logits, (1, 0)).softmax(-1)[..., 1:]  # logit 0: none of them
        read.append((share @ values[:, :, None]).flatten(1, 2))
    return torch.cat(read).to(query.dtype)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
