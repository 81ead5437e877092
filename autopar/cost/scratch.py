"""What an op's kernels need besides what it reads, makes and saves."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Op, Tensor
from .storage import base_name


def is_loss(op: Op) -> bool:
    """A cross entropy on logits."""
    return base_name(op.target) in ("cross_entropy_sum", "cross_entropy_loss")


def is_attention(op: Op) -> bool:
    return base_name(op.target) == "scaled_dot_product_attention"


def attention_bytes(tensors: Sequence[Tensor], sizes: Sequence[int]) -> tuple[int, int]:
    """(matrix of scores, all that is kept besides) where torch has no fused kernel for attention: of float32 with fewer
    key than query heads, on CUDA; 0, 0 for any other.

    tensors, sizes: query [.., h, q, d], key [.., g, k, d] and value, whole and as they lie here. It keeps the scores'
    softmax, and scaled and repeated copies of keys and values in place of the keys.
    """
    query, key, _ = tensors
    if query.dtype.itemsize != 4 or len(query.shape) < 4 or query.shape[-3] == key.shape[-3]:
        return 0, 0
    scores = sizes[0] // query.shape[-1] * key.shape[-2]
    return scores, scores + query.shape[-3] // key.shape[-3] * (sizes[1] + sizes[2]) - sizes[1]


def scratch_bytes(op: Op, sizes: Sequence[int], out_bytes: int, logit_bytes: int = 4) -> tuple[int, int]:
    """(forward, backward) bytes that an op needs besides its inputs, outputs and what it saves.

    sizes: of its inputs. A loss's backward makes the gradient of the log-softmax besides that of the logits, and both,
    like a copy of the logits in its forward, are float32 where the logits (of logit_bytes each) are narrower; a power's
    and a root's take an intermediate result; convolution libraries copy input and result into layouts of their own.
    """
    name = base_name(op.target)
    if is_loss(op):
        wide = sizes[0] * 4 // logit_bytes
        return (wide, 2 * wide) if logit_bytes < 4 else (0, sizes[0])
    if name.startswith(("conv1d", "conv2d", "conv3d", "conv_transpose", "convolution")):
        return 0, sizes[0] + out_bytes
    if name in ("pow", "rsqrt", "square", "sqrt"):
        return 0, out_bytes
    return 0, 0
