"""Backwards in halves: gradients of weights that are put off until nobody waits.

In a block compiled for it, a product with a weight runs as one autograd function whose backward gives the gradient of
its input at once, and leaves a note of what the gradient of the weight takes: the input and the gradient of the output.
The weight half of the backward works these notes off. Nothing else of the graph stays alive between the halves.

A parameter is put off if all that its stage does with it are such products, in one block and with the parameter as it
lies at rest; so it gets its whole gradient in the weight half, and every other parameter its whole one in the input half.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from ..graph import Ref, iterate_refs
from .emit import Call

aten = torch.ops.aten


@dataclass(eq=False)
class Owed:
    """Gradients of weights that one microbatch of a stage still has to compute.

    anchor: makes outputs part of the graph where only what is put off needs a gradient.
    """

    anchor: Tensor = field(default_factory=lambda: torch.empty(0, requires_grad=True))
    _notes: dict[int, tuple[Tensor, list[Callable[[], Tensor]]]] = field(default_factory=dict)

    def note(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        self._notes.setdefault(id(weight), (weight, []))[1].append(compute)

    def settle(self) -> None:
        """Compute them all; each weight gets the sum of its gradients at once, as from a backward that is not split."""
        while self._notes:
            weight, notes = self._notes.pop(next(iter(self._notes)))
            torch.autograd.backward([weight], [worked_off(notes)])


def worked_off(notes: list[Callable[[], Tensor]]) -> Tensor | None:
    """The sum of what the notes compute, which go one by one; None without any."""
    gradient: Tensor | None = None
    while notes:
        more = notes.pop(0)()
        gradient = more if gradient is None else gradient + more
    return gradient


@dataclass(frozen=True)
class Form:
    """An op of an input x [.., i], a weight w and perhaps a bias b, and its gradients from that of its output [.., o].

    x, weight, bias: positions of the arguments. input(grad, x, w, rest), of_weight(grad, x, w, rest), of_bias(grad, b):
    the gradients; rest is the arguments behind these.
    """

    function: Callable[..., Tensor]
    x: int
    weight: int
    bias: int | None
    input: Callable[..., Tensor | None]
    of_weight: Callable[..., Tensor]
    of_bias: Callable[..., Tensor]


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _sum_rows(grad: Tensor, bias: Tensor) -> Tensor:
    return _rows(grad).sum(0).view(bias.shape)


def _sum_channels(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.transpose(0, 1).flatten(1).sum(1)


def _convolution(mask: tuple[bool, bool, bool]) -> Callable[..., Tensor]:
    def gradient(grad: Tensor, x: Tensor, w: Tensor, rest: Sequence[Any]) -> Tensor:
        dims = w.dim() - 2
        given = [*rest, *(1, 0, 1, 1)[len(rest) :]]
        if mask[1]:
            # Its own gradient wants only the weight's shape, and ZeRO 3 has let go of its memory by then.
            w = w.new_empty(w.shape)
        stride, padding, dilation = ([v] * dims if isinstance(v, int) else list(v) for v in given[:3])
        results = aten.convolution_backward(
            grad, x, w, None, stride, padding, dilation, False, [0] * dims, given[3], list(mask)
        )
        return results[mask.index(True)]

    return gradient


def _product(function: Callable[..., Tensor], bias: int | None, x: int, weight: int) -> Form:
    """x [.., i] times w [i, o]."""
    return Form(
        function, x, weight, bias,
        input=lambda grad, x, w, rest: grad @ w.t(),
        of_weight=lambda grad, x, w, rest: _rows(x).t() @ _rows(grad),
        of_bias=_sum_rows,
    )  # fmt: skip


def _conv(function: Callable[..., Tensor]) -> Form:
    return Form(
        function, 0, 1, 2,
        input=_convolution((True, False, False)),
        of_weight=_convolution((False, True, False)),
        of_bias=_sum_channels,
    )  # fmt: skip


FORMS: Mapping[Any, Form] = MappingProxyType(
    {
        form.function: form
        for form in (
            Form(
                aten.linear.default, 0, 1, 2,
                input=lambda grad, x, w, rest: grad @ w,
                of_weight=lambda grad, x, w, rest: _rows(grad).t() @ _rows(x),
                of_bias=_sum_rows,
            ),
            Form(
                aten.embedding.default, 1, 0, None,
                input=lambda grad, x, w, rest: None,
                of_weight=lambda grad, x, w, rest: aten.embedding_dense_backward(
                    grad, x, w.shape[0], *rest[:2], *(-1, False)[len(rest) :]
                ),
                of_bias=_sum_rows,
            ),
            _product(aten.addmm.default, 0, 1, 2),
            _product(aten.mm.default, None, 0, 1),
            _conv(aten.conv1d.default),
            _conv(aten.conv2d.default),
            _conv(aten.conv3d.default),
        )
    }
)  # fmt: skip


def put_off(calls: Sequence[Call], parameters: Collection[str]) -> list[Call]:
    """The calls of a block, with those that use nothing but `parameters` as weights put off.

    parameters: names of values that are parameters at rest, used by no other block of the stage.
    """
    uses: dict[str, int] = {}
    for call in calls:
        for ref in iterate_refs((call.args, tuple(v for _, v in call.kwargs))):
            uses[ref.name] = uses.get(ref.name, 0) + 1
    met: dict[str, int] = {}
    for call in calls:
        for name in _weights(call):
            met[name] = met.get(name, 0) + 1
    chosen = {name for name in parameters if name in met and met[name] == uses[name]}

    def lowered(call: Call) -> Call:
        weights = _weights(call)
        if not chosen.intersection(weights):
            return call
        form = FORMS[call.function]
        which = tuple(isinstance(arg, Ref) and arg.name in chosen for arg in call.args)
        arguments = (Ref("chunk"), form, which, *call.args)
        return Call(product, arguments, (), call.outputs, call.returns_sequence, call.keep)

    return [lowered(call) for call in calls]


def form_of(call: Call) -> tuple[Form, list[str]] | None:
    """The form of a call that is a product, and the values that it uses as weight and bias."""
    try:
        form = FORMS.get(call.function)
    except TypeError:  # not hashable
        return None
    if form is None or call.kwargs or any(isinstance(arg, str) for arg in call.args):
        return None
    places = [p for p in (form.weight, form.bias) if p is not None and p < len(call.args)]
    names = [call.args[p].name for p in places if isinstance(call.args[p], Ref)]
    others = [arg.name for i, arg in enumerate(call.args) if i not in places and isinstance(arg, Ref)]
    return None if set(names) & set(others) else (form, names)


def _weights(call: Call) -> list[str]:
    found = form_of(call)
    return [] if found is None else found[1]


def product(chunk: Any, form: Form, which: tuple[bool, ...], *args: Any) -> Tensor:
    """A product of `form`; which: the arguments whose gradients are put off where the chunk keeps notes."""
    if chunk.owed is None or not torch.is_grad_enabled():
        return form.function(*args)
    return noted(chunk.owed, chunk.owed.anchor, form, which, args)


class Notes(Protocol):
    """Who is told of gradients to compute later."""

    def note(self, weight: Tensor, compute: Callable[[], Tensor]) -> None: ...


def noted(notes: Notes, anchor: Tensor | None, form: Form, which: Sequence[bool], args: Sequence[Any]) -> Tensor:
    """A product whose backward tells `notes` how to compute the gradients of the arguments `which`.

    anchor: what makes the result part of the graph where only these arguments need a gradient.
    """
    # Autograd must not see these tensors: it would tell their hooks of a gradient at once.
    hidden = tuple(arg if late else None for arg, late in zip(args, which, strict=True))
    shown = tuple(None if late else arg for arg, late in zip(args, which, strict=True))
    trained = any(arg is not None and arg.requires_grad for arg in hidden)
    return _Product.apply(notes, form, anchor if trained else None, hidden, *shown)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, notes: Notes, form: Form, anchor: Tensor | None, hidden: tuple[Tensor | None, ...], *shown: Any
    ) -> Tensor:
        args = tuple(s if h is None else h for h, s in zip(hidden, shown, strict=True))
        ctx.notes, ctx.form, ctx.hidden = notes, form, hidden
        # Weights stay as they are from forward to backward, and the note must name the very tensor that gets a gradient.
        ctx.args = tuple(None if i == form.x else arg for i, arg in enumerate(args))
        ctx.save_for_backward(args[form.x])
        return form.function(*args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        notes, form, args, (x,) = ctx.notes, ctx.form, ctx.args, ctx.saved_tensors
        needs = ctx.needs_input_grad[4:]
        places = {form.x, form.weight, *(() if form.bias is None else (form.bias,))}
        weight, rest = args[form.weight], [arg for i, arg in enumerate(args) if i not in places]
        gradients: list[Tensor | None] = [None] * len(args)
        if needs[form.x]:
            gradients[form.x] = form.input(grad, x, weight, rest)
        computed: list[tuple[int, Callable[[], Tensor]]] = [
            (form.weight, lambda: form.of_weight(grad, x, weight, rest))
        ]
        if form.bias is not None and form.bias < len(args) and args[form.bias] is not None:
            bias = args[form.bias]
            computed.append((form.bias, lambda: form.of_bias(grad, bias)))
        for place, compute in computed:
            late = ctx.hidden[place]
            if late is not None and late.requires_grad:
                notes.note(late, compute)
            elif needs[place]:
                gradients[place] = compute()
        return None, None, None, None, *gradients
