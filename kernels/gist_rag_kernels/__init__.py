"""Operations that gist-rag spends its time in, each with a plain torch reference.

One folder per operation: ``op.py`` is what people call (shapes checked, implementation chosen),
``reference.py`` is the truth in plain torch.
"""

from gist_rag_kernels.compose_kv.op import compose_kv
from gist_rag_kernels.compose_kv.reference import rotate
from gist_rag_kernels.slot_attention.op import slot_attention

__all__ = ["compose_kv", "rotate", "slot_attention"]
