"""Recomputation of a block in its backward: all of it, or all but its expensive ops.

A block is called through `torch.utils.checkpoint`, which lets go of what autograd would save and calls the block again
when the backward asks for it. Selectively, the results of the expensive ops (products, convolutions, attention) and of
the conversions between placements, which communicate, are kept from the first call and handed out in the second, as
Korthikanti et al. 2022 (Reducing Activation Recomputation, section 5) keep all but attention's cheap inside.

torch's own `create_selective_checkpoint_contexts` watches every op of a block from Python. Here the generated code names
the expensive calls (`Call.keep`), so that only these pay for being watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from .overlap import begun

if TYPE_CHECKING:
    from .rewrite import Chunk
    from .stage import CompiledBlock

# Captured ops, by the name between "aten." and the overload, and what torch runs for them below autograd.
_PRODUCTS = ("linear", "mm", "bmm", "mv", "dot", "addmm", "baddbmm")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
EXPENSIVE_OPS = frozenset(
    (*_PRODUCTS, *_CONVOLUTIONS, "matmul", "einsum", "convolution", "scaled_dot_product_attention")
)
_EXPENSIVE_KERNELS = frozenset((*_PRODUCTS, "addmv", "convolution"))


def call_block(
    call: Callable[..., Any],
    block: CompiledBlock,
    training: bool,
    chunk: Chunk,
    sides: list[Tensor],
    activations: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """`call((block, training, chunk, sides), *activations)`, computed again in the backward as `block.recompute` says."""
    if block.recompute == "none" or not torch.is_grad_enabled():
        return call((block, training, chunk, sides), *activations)
    options = {}
    if block.recompute == "selective":
        kept = Kept()
        chunk = replace(chunk, kept=kept)
        options["context_fn"] = kept.contexts
    around = (block, training, chunk, sides)
    # Random ops draw from streams of their own (runtime/random.py), which a second call opens again.
    return checkpoint(call, around, *activations, use_reentrant=False, preserve_rng_state=False, **options)


class Kept:
    """Results of the expensive calls of one call of a block: noted the first time, handed out the second."""

    def __init__(self) -> None:
        self._results: list[Any] = []
        self._again = False

    def contexts(self) -> tuple[Any, Any]:
        """What `checkpoint` opens around the first and around the second call."""
        return self._first(), self._second()

    @contextmanager
    def _first(self) -> Iterator[None]:
        yield

    @contextmanager
    def _second(self) -> Iterator[None]:
        self._again = True
        self._results.reverse()
        try:
            yield
        finally:
            self._results.clear()

    def op(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op whose backward may save tensors: autograd must see it both times, but the second is no work."""
        with _Watch(self):
            return function(*args, **kwargs)

    def conversion(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """A conversion saves nothing for its backward, so what comes out of it is all that the second call needs."""
        if not self._again:
            result = function(*args)
            self._results.append(result.detach())
            return result
        return self._results.pop().requires_grad_(any(isinstance(a, Tensor) and a.requires_grad for a in args))

    def begin(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What starts a conversion, see runtime/overlap.py: the second time its result is there already."""
        return begun(*args) if self._again else function(*args)

    def kernel(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._again:
            result = func(*args, **kwargs)
            # A tensor of its own on the same memory: what autograd makes of the result must not hold the graph.
            self._results.append(tree_map_only(Tensor, Tensor.detach, result))
            return result
        return self._results.pop()


class _Watch(TorchDispatchMode):
    """Sees what an op runs below autograd, where a result can be put in place of the work."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in _EXPENSIVE_KERNELS or name.startswith("_scaled_dot_product"):
            return self._kept.kernel(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
