"""A whole graph on all ranks of a (batch x model axes) grid in one process, by the strategies given for each op.

What the runtime does with processes, done with lists: the values of one chunk of the batch on every rank of the model
axes, one chunk after the other. Shares no code with the runtime.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autopar.capture.export import capture
from autopar.graph import DEVICE, Graph, Op, map_refs
from autopar.sharding.axes import Places
from autopar.sharding.batch import BatchLayout, batch_layout
from autopar.sharding.emulate import AxisOf, EmulatedAxis, convert, hand_out, hand_out_all, on_every_rank_of
from autopar.sharding.flow import Run
from autopar.sharding.local import BATCH, localize
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split
from autopar.sharding.strategies import strategies
from autopar.sharding.strategy import Strategy

# Algorithms whose backward communicates too; here one thread runs the backward of all ranks.
BACKWARD_MEETS = ("ring_attention", "exchanged_groups", "halo", "batch_norm", "group_norm", "instance_norm")

Values = Mapping[str, torch.Tensor]


def run_emulated(
    graph: Graph,
    values: Values,
    shards: int,
    degrees: tuple[int, ...],
    chosen: Mapping[str, tuple[Strategy, ...]],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of all parameters, summed over `shards` chunks of the batch.

    values: every input, parameter, buffer and constant of the graph, whole. degrees: of the model axes.
    chosen: strategies of each main op, one per model axis.
    """
    layout = batch_layout(graph, shards)
    assert shards == 1 or not layout.conflict
    whole: dict[str, torch.Tensor] = {}
    for name in layout.prologue:
        parts = [_Chunk(graph, values, layout, chunk, degrees, chosen, whole).side(name) for chunk in range(shards)]
        whole[name] = torch.stack(parts).sum(0)
    loss = torch.zeros(())
    gradients: dict[str, torch.Tensor] = {}
    for chunk in range(shards):
        one, found = _Chunk(graph, values, layout, chunk, degrees, chosen, whole).run()
        loss = loss + one
        for name, gradient in found.items():
            gradients[name] = gradients.get(name, 0) + gradient
    return loss, gradients


class _Chunk:
    def __init__(
        self,
        graph: Graph,
        values: Values,
        layout: BatchLayout,
        chunk: int,
        degrees: tuple[int, ...],
        chosen: Mapping[str, tuple[Strategy, ...]],
        whole: Values,
    ) -> None:
        self.graph, self.layout, self.chunk, self.degrees, self.chosen = graph, layout, chunk, degrees, chosen
        self.num_ranks, self.replicated = math.prod(degrees), (REPLICATED,) * len(degrees)
        self.shards, self.whole = layout.shards, whole
        self.lists: dict[str, list[torch.Tensor]] = {}
        self.placed: dict[str, Places] = {}
        self.leaves: dict[str, list[torch.Tensor]] = {}
        for name, value in values.items():
            tensor = graph.tensors[name]
            if tensor.role == "parameter" and tensor.requires_grad:
                self.leaves[name] = [value.detach().clone().requires_grad_() for _ in range(self.num_ranks)]
                self.lists[name] = self.leaves[name]
            else:
                self.lists[name] = [hand_out(value, layout.placements[name], self.shards)[chunk]] * self.num_ranks
            self.placed[name] = self.replicated

    def side(self, name: str) -> torch.Tensor:
        """A side tensor of this chunk, as produced."""
        needed, names = [], {name}
        for op in reversed(self.graph.ops):
            if names.intersection(op.outputs):
                needed.append(op)
                names.update(t for t in op.inputs if t not in self.whole)
        for op in reversed(needed):
            self.run_op(op)
        return self.lists[name][0]

    def run(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for op in self.graph.ops:
            self.run_op(op)
        losses = convert(self.lists[self.graph.loss], self.placed[self.graph.loss], self.replicated, self.degrees)
        torch.autograd.backward(losses, [torch.ones_like(x) for x in losses])
        found = {}
        for name, leaves in self.leaves.items():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
            for other in gradients[1:]:  # parameters rest REPLICATED: the gradient is whole on every rank
                torch.testing.assert_close(other, gradients[0])
            found[name] = gradients[0]
        return losses[0].detach(), found

    def run_op(self, op: Op) -> None:
        batch = self.layout.strategies[op.name]
        model = self.chosen.get(op.name)
        if model is None:
            model = tuple(strategies(self.graph, op, n, self.shards)[0] for n in self.degrees)
        run = Run(op, model)
        operands = [self.value(*wanted) for wanted in zip(op.inputs, batch.inputs, run.inputs, strict=True)]
        call = localize(self.graph, op, batch, self.shards, model, self.degrees)

        def on_rank(axis_of: AxisOf, rank: int) -> list[torch.Tensor]:
            named = iter(operands)
            args, kwargs = map_refs((call.args, tuple(v for _, v in call.kwargs)), lambda _: next(named)[rank])
            axes = [EmulatedAxis(self.chunk, self.shards) if a == BATCH else axis_of(a) for a in call.axes]
            with torch.set_grad_enabled(not op.no_grad):
                named_kwargs = {key: _real(v) for (key, _), v in zip(call.kwargs, kwargs, strict=True)}
                out = call.function(*axes, *map(_real, args), **named_kwargs)
            return list(out) if isinstance(out, tuple | list) else [out]

        results = on_every_rank_of(self.degrees, on_rank, [a for a in call.axes if a != BATCH])
        for i, name in enumerate(op.outputs):
            self.lists[name] = [r[i] for r in results]
            self.placed[name] = run.outputs[i]

    def value(self, tensor: str, on_batch: Placement, on_model: Places) -> list[torch.Tensor]:
        if tensor in self.whole:
            assert on_batch == REPLICATED
            return hand_out_all(self.whole[tensor], list(zip(on_model, self.degrees, strict=True)))
        values, have = self.lists[tensor], self.placed[tensor]
        start = self.layout.placements[tensor]
        if start == on_batch or self.shards == 1:
            local = [_local(places, on_batch, self.shards) for places in (have, on_model)]
            return convert(values, *local, self.degrees)
        assert start in (REPLICATED, SHARED), f"{tensor}: {start} -> {on_batch} is not local"
        if isinstance(on_batch, Split):
            whole = convert(values, have, self.replicated, self.degrees)
            values = [hand_out(v, on_batch, self.shards)[self.chunk] for v in whole]
            return convert(values, self.replicated, _local(on_model, on_batch, self.shards), self.degrees)
        values = [v / self.shards for v in values] if on_batch == PARTIAL else values
        return convert(values, have, on_model, self.degrees)


def _local(places: Places, on_batch: Placement, shards: int) -> Places:
    """The placements of what the batch axis has left."""
    found = []
    for place in places:
        if isinstance(place, Split) and isinstance(on_batch, Split) and place.dim == on_batch.dim:
            inside = on_batch.blocks < place.blocks
            place = Split(place.dim, place.blocks // shards if inside else place.blocks)
        found.append(place)
    return tuple(found)


def _real(value: Any) -> Any:
    if value is DEVICE:
        return torch.device("cpu")
    if value is torch.float32:
        return torch.float64  # the graph was captured in float32 and is checked in float64
    return [_real(v) for v in value] if isinstance(value, tuple) else value


def reference(
    module: torch.nn.Module, example: Any, loss_function: Callable[..., torch.Tensor] | None = None
) -> tuple[Graph, dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Graph, values of its leaves in float64, loss and gradients of the whole graph in float64.

    The latter agree with the module's own, in the module's float32.
    """
    example = (example,) if isinstance(example, torch.Tensor) else example
    graph = capture(module, example, loss_function)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {t.name: state[t.fqn].detach() for t in graph.tensors.values() if t.role in ("parameter", "buffer")}
    values |= graph.constants
    values |= {t: _entry(example, key) for t, key in zip(graph.inputs, graph.input_keys, strict=True)}
    values = _double(values)
    loss, gradients = run_emulated(graph, values, 1, (), {})
    takes = inspect.signature(module.forward).parameters
    entries = example.items() if isinstance(example, Mapping) else zip(takes, example, strict=False)
    inputs = {key: value for key, value in entries if key in takes}
    out = module(**inputs)
    if loss_function is None:
        own = out if isinstance(out, torch.Tensor) else out["loss"]
    else:
        everything = example.values() if isinstance(example, Mapping) else example
        own = loss_function(out, *list(everything)[len(inputs) :])
    own.backward()
    torch.testing.assert_close(loss.float(), own.detach(), rtol=1e-5, atol=1e-6)
    by_name = dict(module.named_parameters())
    for t in graph.parameters:
        if not t.requires_grad:
            assert t.name not in gradients and by_name[t.fqn].grad is None
            continue
        torch.testing.assert_close(gradients[t.name].float(), by_name[t.fqn].grad, rtol=1e-3, atol=1e-5)
    return graph, values, loss, gradients


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    return tuple(map(_double, value)) if isinstance(value, tuple | list) else value


def _entry(example: Any, key: Any) -> torch.Tensor:
    for part in key if isinstance(key, tuple) else (key,):
        example = example[part]
    return example
