"""Collectives of the model axes behind work that does not wait for them.

A conversion that communicates is cut in two calls, `begin` and `finish`. What stands between them runs while the data
travel, in the forward, and, as autograd walks the calls backwards, in the backward too, where `finish` starts the dual
collective and `begin` waits for it. Two things stand between:

- calls of the block that need nothing of it: `overlapped` puts them there, by a list schedule. Calls that lead to an
  earlier conversion go first, then others in the order of the graph, and a `finish` only when nothing else is left.
- gradients of weights. Products of what was converted, as it is or normalised, give the gradients of their inputs at
  once, and leave to `begin` those of their weights, to be computed while the gradient of the input travels (Korthikanti
  et al. 2022, section 4.2.2; Megatron-LM's linear layers do it inside of one). Weights therefore enter autograd's graph
  at `begin`, and not at the products.

A pair with nothing worth while between is left the one call that it was. Parameters that a block gathers are as well: to
begin earlier would keep them whole for longer.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..graph import Ref, iterate_refs
from ..sharding.placement import Placement, conversion
from .axis import Arrive, Axis
from .collectives import COLLECTIVES, Conversion, convert, start
from .deferred import Form, form_of, noted, worked_off
from .emit import Call

# What products may see a converted tensor through: views, and cheap ops that hand a gradient to each tensor that they
# read, so that the products' backward is over when the conversion's begins.
_THROUGH = frozenset(
    (
        "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "permute", "transpose", "t", "flatten", "contiguous",
        "expand", "clone", "to", "_to_copy", "add", "sub", "mul", "div", "neg", "pow", "rsqrt", "sqrt", "mean",
        "layer_norm", "rms_norm",
    )
)  # fmt: skip


@dataclass(eq=False)
class Travel:
    """A conversion on its way.

    differentiable: whether its backward is wanted. Else products compute as if it were not there.
    arrive, returns: what waits for its value, and for the gradient on the way back, while these travel.
    """

    conversion: Conversion
    differentiable: bool
    arrive: Arrive | None = None
    returns: Arrive | None = None
    _notes: dict[int, list[Callable[[], Tensor]]] = field(default_factory=dict)

    def note(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        """compute: a summand of the gradient of `weight`."""
        self._notes.setdefault(id(weight), []).append(compute)

    def settle(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of `weights`, by what has been noted of them; the notes go as they are worked off."""
        return [worked_off(self._notes.pop(id(weight), [])) for weight in weights]


@torch.compiler.disable
def begin(
    tensor: Tensor,
    axis: Axis,
    have: Placement,
    want: Placement,
    have_blocks: int,
    want_blocks: int,
    in_place: bool,
    *weights: Tensor,
) -> tuple[Travel, Tensor]:
    """Start to convert `tensor`, as `convert` does: what is on its way, and what stands for it in autograd's graph.

    weights: of products that leave their weights' gradients to the conversion's backward.
    """
    travel = _travel(tensor, axis, have, want, have_blocks, want_blocks, in_place)
    if travel.differentiable:
        return travel, _Begin.apply(travel, tensor, *weights)
    travel.arrive = start(travel.conversion, tensor)
    return travel, tensor.new_empty(0)


def begun(tensor: Tensor, *arguments: Any) -> tuple[Travel, Tensor]:
    """What `begin` gives, where nothing has to travel because the result is known already."""
    travel = _travel(tensor, *arguments[:6])
    return travel, tensor.new_empty(0).requires_grad_(travel.differentiable)


def _travel(tensor: Tensor, *arguments: Any) -> Travel:
    return Travel(Conversion.of(*arguments), tensor.requires_grad and torch.is_grad_enabled())


@torch.compiler.disable
def finish(travel: Travel, token: Tensor) -> Tensor:
    """The converted tensor."""
    if travel.differentiable:
        return _Finish.apply(travel, token)
    return _arrived(travel)


@torch.compiler.disable
def product_beside(travel: Travel, form: Form, which: tuple[bool, ...], *args: Any) -> Tensor:
    """A product of `form` with what `travel` brings; which: the arguments whose gradients are left to its backward."""
    if not travel.differentiable or not args[form.x].requires_grad:
        return form.function(*args)
    return noted(travel, None, form, which, args)


def _arrived(travel: Travel) -> Tensor:
    assert travel.arrive is not None
    arrive, travel.arrive = travel.arrive, None
    return arrive()


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: Travel, tensor: Tensor, *weights: Tensor) -> Tensor:
        ctx.travel, ctx.weights = travel, weights
        travel.arrive = start(travel.conversion, tensor)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.travel.settle(ctx.weights)
        returns, ctx.travel.returns = ctx.travel.returns, None
        return None, returns(), *gradients


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, travel: Travel, token: Tensor) -> Tensor:
        ctx.travel = travel
        # What does not travel at all is the tensor itself, which has a place of its own in autograd's graph.
        return _arrived(travel).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        travel = ctx.travel
        travel.returns = start(travel.conversion.dual, gradient)
        return None, gradient.new_empty(0)


# -- the pass


def overlapped(
    calls: Sequence[Call], parameters: frozenset[str], reorders: bool = True, attaches: bool = True
) -> list[Call]:
    """The calls of a block, with conversions apart from what waits for them.

    parameters: names of values that are parameters, there from the beginning. reorders: whether calls may change places.
    attaches: whether products may leave their weights' gradients to the backward of conversions.
    """
    pairs = {
        call.outputs[0]: call
        for call in calls
        if call.function is convert and call.args[0].name not in parameters and any(_travels(call))
    }
    weights: dict[str, tuple[str, ...]] = {}
    if attaches:
        calls, weights = _attached(calls, pairs, parameters)
    parted: list[Call] = []
    for call in calls:
        whose = call.outputs[0] if call.outputs else ""
        parted += _parted(call, weights.get(whose, ())) if whose in pairs else [call]
    if reorders:
        ordered = _scheduled(parted)
        if _hiding(ordered):
            parted = ordered
    keep = {*_hiding(parted), *weights}
    joined: list[Call] = []
    for call in parted:
        value = _converted(call)
        if value and value not in keep:
            joined += [pairs[value]] if call.function is finish else []
        else:
            joined.append(call)
    return joined


def _travels(call: Call) -> tuple[bool, bool]:
    """Whether a conversion communicates, forward and backward."""
    actions = conversion(call.args[2], call.args[3])
    return actions.forward in COLLECTIVES, actions.backward in COLLECTIVES


def _parted(call: Call, weights: Sequence[str]) -> list[Call]:
    """A conversion in two calls."""
    (name,) = call.outputs
    way = (f"{name}|travel", f"{name}|token")
    return [
        Call(begin, (*call.args, *map(Ref, weights)), (), way, keep="begin" if call.keep else ""),
        Call(finish, tuple(map(Ref, way)), (), (name,), keep=call.keep),
    ]


def _converted(call: Call) -> str:
    """The value of the conversion that a begin or a finish is one half of; "" for other calls."""
    if call.function is begin:
        return call.outputs[0].removesuffix("|travel")
    return call.outputs[0] if call.function is finish else ""


def _attached(
    calls: Sequence[Call], pairs: Collection[str], parameters: frozenset[str]
) -> tuple[list[Call], dict[str, tuple[str, ...]]]:
    """The calls, with products that leave the gradients of parameters to the backward of what converted their input; and
    by converted value these parameters.

    pairs: the values of conversions that are taken apart.
    """
    source: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    changed: list[Call] = []
    for call in calls:
        if call.outputs and call.outputs[0] in pairs and _travels(call)[1]:
            source[call.outputs[0]] = call.outputs[0]
        elif _name(call) in _THROUGH:
            ways = [source[name] for name in _read(call) if name in source]
            source |= dict.fromkeys(call.outputs, ways[-1]) if ways else {}
        product = form_of(call)
        x = call.args[product[0].x] if product else None
        if product and isinstance(x, Ref) and x.name in source and product[1][:1] and product[1][0] in parameters:
            late = parameters & set(product[1])
            way = source[x.name]
            found.setdefault(way, []).extend(name for name in product[1] if name in late)
            which = tuple(isinstance(arg, Ref) and arg.name in late for arg in call.args)
            arguments = (Ref(f"{way}|travel"), product[0], which, *call.args)
            call = replace(call, function=product_beside, args=arguments)
        changed.append(call)
    return changed, {way: tuple(dict.fromkeys(names)) for way, names in found.items()}


def _name(call: Call) -> str:
    """The op's name between "aten." and the overload; "" where something else is called, or a tensor read for its type."""
    if not isinstance(call.function, torch._ops.OpOverload):
        return ""
    namespace, name, overload = str(call.function).split(".")
    return name if namespace == "aten" and overload != "other" else ""


def _scheduled(calls: Sequence[Call]) -> list[Call]:
    """The calls in another order: begins as soon as they can, finishes when nothing else can go on."""
    made = {name: i for i, call in enumerate(calls) for name in call.outputs}
    needs = [sorted({made[name] for name in _read(call) if name in made}) for call in calls]
    users: list[list[int]] = [[] for _ in calls]
    depth = [0] * len(calls)
    for i, sources in enumerate(needs):
        for source in sources:
            users[source].append(i)
            depth[i] = max(depth[i], depth[source] + (calls[source].function is finish))
    # Which conversion comes first of those that wait for a call: one behind fewer others.
    urgency = [float(depth[i]) if call.function is begin else math.inf for i, call in enumerate(calls)]
    for i in reversed(range(len(calls))):
        urgency[i] = min([urgency[i], *(urgency[user] for user in users[i])])

    def priority(i: int) -> tuple[int, float, int]:
        function = calls[i].function
        return (0, 0.0, i) if function is begin else (2, 0.0, i) if function is finish else (1, urgency[i], i)

    waits = [len(sources) for sources in needs]
    ready = [priority(i) for i, count in enumerate(waits) if count == 0]
    heapq.heapify(ready)
    ordered: list[Call] = []
    while ready:
        *_, i = heapq.heappop(ready)
        ordered.append(calls[i])
        for user in users[i]:
            waits[user] -= 1
            if waits[user] == 0:
                heapq.heappush(ready, priority(user))
    assert len(ordered) == len(calls)
    return ordered


def _hiding(calls: Sequence[Call]) -> set[str]:
    """The converted values with work between their conversions' two calls that takes its time."""
    open_: set[str] = set()
    found: set[str] = set()
    for call in calls:
        if call.function is begin:
            open_.add(_converted(call))
        elif call.function is finish:
            open_.discard(_converted(call))
        elif call.is_expensive:
            found |= open_
    return found


def _read(call: Call) -> Iterator[str]:
    return (ref.name for ref in iterate_refs((call.args, tuple(v for _, v in call.kwargs))))
