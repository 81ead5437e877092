"""The loss as autograd sees it: its backward hands out the gradients that the program has computed already.

They are multiplied by what the loss's gradient is, since a loop may scale its loss. On an accelerator nobody can tell that
factor from 1 without waiting for the device, and a multiplication by 1 moves all gradients through memory; so a loss knows
of its own `backward()`, whose factor is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..torch_private import is_watched
from .storage import deliver


@dataclass(eq=False)
class Delivery:
    """parameters: at rest, by name. gradients: a step's, taken over; None once they have been handed out. after(factor):
    what to multiply them with in place of the factor. is_one: whether the factor is known to be 1."""

    parameters: Mapping[str, nn.Parameter]
    gradients: Mapping[str, Tensor] | None
    after: Callable[[Tensor], Tensor] | None = None
    is_one: bool = False


def delivering(anchor: Tensor, loss: Tensor, delivery: Delivery) -> Tensor:
    """The loss, whose backward delivers. anchor: a leaf that makes autograd want its gradient."""
    inner = _Deliver.apply(anchor, loss, delivery)
    result = inner.view_as(inner)
    result.backward = _Backward(ref(result), inner, delivery)
    return result


class _Deliver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, loss: Tensor, delivery: Delivery) -> Tensor:
        ctx.delivery = delivery
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[None, ...]:
        delivery: Delivery = ctx.delivery
        if delivery.gradients is None:
            raise RuntimeError("this loss has been differentiated already; its gradients are handed out once")
        if delivery.after is not None:
            deliver(delivery.parameters, delivery.gradients, delivery.after(factor))
        else:
            deliver(delivery.parameters, delivery.gradients, 1.0 if delivery.is_one else factor)
        delivery.gradients = None
        return None, None, None


class _Backward:
    """`Tensor.backward` of one loss. It goes with the tensor into copies and files, where there is no graph any more.

    loss: the tensor whose method this is, None once it has gone (it does in `model(batch).backward()`). inner: the same
    number, which only this holds, so that nothing holds itself.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor | None] = lambda: None,
        inner: Tensor | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        self._loss = loss
        self._inner = inner
        self._delivery = delivery

    def __call__(self, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        loss, inner, delivery = self._loss(), self._inner, self._delivery
        if inner is None or delivery is None:
            raise RuntimeError(
                "this is a copy of a loss, which has no graph: call backward() on what the model returned"
            )
        if gradient is None and (loss is None or not is_watched(loss)):
            delivery.is_one = True
            loss = inner
        try:
            Tensor.backward(inner if loss is None else loss, gradient, *args, **kwargs)
        finally:
            delivery.is_one = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Backward, ()
