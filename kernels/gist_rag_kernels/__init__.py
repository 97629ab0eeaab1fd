"""Operations that gist-rag spends its time in, each with a plain torch reference.

One folder per operation: ``op.py`` is what people call (shapes checked, implementation chosen),
``reference.py`` is the truth in plain torch, ``kernel.py`` the same in Triton. ``runtime`` chooses.
"""

from gist_rag_kernels.compose_kv.op import compose_kv, compose_packed
from gist_rag_kernels.compose_kv.reference import Composed, rotate
from gist_rag_kernels.gist_attention.op import gist_attention
from gist_rag_kernels.gist_attention.reference import visibility
from gist_rag_kernels.gist_attention.shift import Shift, gist_shift
from gist_rag_kernels.kv_quant.op import dequantise, quantise
from gist_rag_kernels.kv_quant.packed import PackedKV
from gist_rag_kernels.retention_attention.op import retention_attention
from gist_rag_kernels.runtime import choose, describe, flash_for
from gist_rag_kernels.select_fit.op import fit_slots, score_keys
from gist_rag_kernels.select_fit.reference import kept_groups
from gist_rag_kernels.slot_attention.op import ragged_slot_attention, slot_attention
from gist_rag_kernels.slot_attention.ragged import Plan, RaggedSlots, plan, plan_layers

__all__ = [
    "Composed",
    "PackedKV",
    "Plan",
    "RaggedSlots",
    "Shift",
    "choose",
    "compose_kv",
    "compose_packed",
    "dequantise",
    "describe",
    "fit_slots",
    "flash_for",
    "gist_attention",
    "gist_shift",
    "kept_groups",
    "plan",
    "plan_layers",
    "quantise",
    "ragged_slot_attention",
    "retention_attention",
    "rotate",
    "score_keys",
    "slot_attention",
    "visibility",
]
