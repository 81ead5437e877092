"""Bytes that one block keeps and needs, per rank and microbatch, by walking its steps forward and back.

Activations are counted by storage: views share their base's, a tensor that several ops save counts once, parameters and
batch inputs are at rest and do not count again. In the forward a tensor lives from its op to its last use, or on to the
backward where some op saves it. In the backward a gradient lives from its first contribution to its producer's
backward; views and sums pass their gradient on without a copy. Ignored: allocator rounding and fragmentation, and
scratch space inside library kernels.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

from ..graph import Block, Graph, Op
from ..sharding.axes import Places, absolute
from ..sharding.flow import Convert, Run, Step
from ..sharding.placement import Split, conversion
from .borders import copies_input, widening
from .kernels import counted_in_flops
from .local import LocalShapes
from .scratch import attention_bytes, is_attention, is_loss, scratch_bytes
from .storage import VIEWS, Storages, base_name


@dataclass(frozen=True, slots=True)
class BlockMemory:
    """Bytes of one block, one microbatch, one rank.

    saved_bytes: storages made in the block that its backward needs. input_bytes, output_bytes: by position;
    saves_input, saves_output: whether that storage is among what the backward needs (an output's is then in
        saved_bytes).
    side_bytes, read_side_bytes: storages of side tensors that the backward needs, and that the block reads at all, by
        name: blocks of a stage share them.
    forward_peak_bytes: most that is alive in the forward, beyond the block's saved inputs; bare_peak_bytes: the same
        when nothing is saved (the first forward under recompute), kept_peak_bytes: when the results of ops counted in
        flops are (under selective recomputation).
    backward_peak_bytes: most that is alive in the backward beyond saved_bytes, the gradients of the block's outputs
        among it; parameter gradients count only where they are temporary. whole_gradients_peak_bytes: the same where
        all of them stay to the block's end, to be scattered together.
    parameter_bytes: one entry per `Block.parameters`, as it lies; used_bytes: the same as it is used, which is more where a
        model axis gathers it. selective_bytes: of the results that selective recomputation
        keeps, those of ops counted in flops. deferred_bytes: of the inputs and the gradients of the results of ops
        with a weight, which stay while that weight's gradient is put off.
    """

    saved_bytes: int
    input_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]
    saves_input: tuple[bool, ...]
    saves_output: tuple[bool, ...]
    side_bytes: tuple[tuple[str, int], ...]
    read_side_bytes: tuple[tuple[str, int], ...]
    forward_peak_bytes: int
    bare_peak_bytes: int
    kept_peak_bytes: int
    backward_peak_bytes: int
    parameter_bytes: tuple[int, ...]
    used_bytes: tuple[int, ...]
    selective_bytes: int = 0
    deferred_bytes: int = 0
    whole_gradients_peak_bytes: int = 0


# A storage is named by the tensor (and its placement) that made it.
_Key = tuple[str, str]


@dataclass(frozen=True)
class BlockView:
    """A block on one rank: its steps, local sizes, and the placements at its edges, one per model axis (() for none)."""

    graph: Graph
    block: Block
    steps: Sequence[Step]
    local: LocalShapes
    degrees: tuple[int, ...]
    storages: Storages
    input_placements: tuple[Places, ...]
    parameter_placements: tuple[Places, ...]
    fused_loss: bool = False
    wide_loss: bool = True
    whole_scores: bool = False

    def size(self, tensor: str, places: Places) -> int:
        return self.local.held_bytes(tensor, places, self.degrees)

    def inputs_of(self, run: Run) -> tuple[Places, ...]:
        """In absolute form, as conversions and the edges have them."""
        return tuple(absolute(places, self.degrees) for places in run.inputs)

    def outputs_of(self, run: Run) -> tuple[Places, ...]:
        return tuple(absolute(places, self.degrees) for places in run.outputs)


def token(places: Places) -> str:
    return " ".join(map(str, places))


def block_memory(view: BlockView, accumulate: bool) -> BlockMemory:
    """Walk `view.steps`. accumulate: there are several microbatches, so new parameter gradients are temporary."""
    walk = _Walk(view)
    graph, block = view.graph, view.block
    saved = {key: size for key, size in walk.saved.items() if key in walk.made}
    side = {name: size for (name, _), size in walk.saved.items() if _is_side(graph, name)}
    outputs = [walk.at_end(name) for name in block.outputs]
    backward_peak_bytes, whole_gradients_peak_bytes = walk.backward_peaks(accumulate)
    inputs = [(name, "") for name in block.inputs]
    at_rest = [view.size(name, place) for name, place in zip(block.parameters, view.parameter_placements, strict=True)]
    return BlockMemory(
        saved_bytes=sum(saved.values()) + walk.extra_bytes,
        input_bytes=tuple(
            view.size(name, place) for name, place in zip(block.inputs, view.input_placements, strict=True)
        ),
        output_bytes=tuple(walk.sizes.get(key, 0) for key in outputs),
        saves_input=tuple(key in walk.saved for key in inputs),
        saves_output=tuple(key in saved or key in inputs for key in outputs),
        side_bytes=tuple(side.items()),
        read_side_bytes=tuple((name, size) for (name, _), size in walk.sizes.items() if _is_side(graph, name)),
        forward_peak_bytes=walk.forward_peak(saving=True),
        bare_peak_bytes=walk.forward_peak(saving=False),
        kept_peak_bytes=walk.forward_peak(saving=False, keeping=walk.expensive),
        backward_peak_bytes=backward_peak_bytes,
        parameter_bytes=tuple(at_rest),
        used_bytes=tuple(max(size, walk.most_of(name)) for name, size in zip(block.parameters, at_rest, strict=True)),
        selective_bytes=sum(size for key, size in walk.expensive.items() if key in walk.made),
        deferred_bytes=walk.deferred_bytes,
        whole_gradients_peak_bytes=whole_gradients_peak_bytes,
    )


def _is_side(graph: Graph, name: str) -> bool:
    producer = graph.producer.get(name)
    return producer is not None and producer.name in graph.side_ops


class _Walk:
    """Storages of a block, who makes them, who uses them last, and who saves them."""

    def __init__(self, view: BlockView) -> None:
        self.view = view
        graph = view.graph
        self.sizes: dict[_Key, int] = {}
        self.made: dict[_Key, int] = {}  # storage -> the step that makes it
        self.last_use: dict[_Key, int] = {}
        self.saved: dict[_Key, int] = {}
        self.savers: dict[_Key, int] = {}  # storage -> the first step that saves it: its backward is the last user
        self.extra: dict[int, int] = {}  # step -> bytes that autograd keeps besides
        self.scratch: dict[int, tuple[int, int]] = {}
        self.deferred: dict[_Key, int] = {}  # what weights' gradients are made from
        self.put_off = 0  # bytes of gradients that weights' gradients are made from
        self.expensive: dict[_Key, int] = {}  # results of ops counted in flops
        self.where: dict[tuple[str, str], _Key] = {}
        self.have: dict[str, str] = {}
        for name, place in zip(view.block.inputs, view.input_placements, strict=True):
            self._enter(name, place)
        for index, step in enumerate(view.steps):
            if isinstance(step, Convert):
                self._convert(index, step)
            else:
                self._run(index, step)
        for name in view.block.outputs:
            self.last_use[self.at_end(name)] = len(view.steps)
        self.extra_bytes = sum(self.extra.values())
        self.deferred_bytes = sum(self.deferred.values()) + self.put_off
        self.graph = graph

    def _enter(self, name: str, place: Places) -> None:
        key = (name, "")
        self.where[name, token(place)] = key
        self.have[name] = token(place)
        self.sizes[key] = self.view.size(name, place)

    def _use(self, name: str, place: Places, index: int) -> _Key:
        if (name, token(place)) not in self.where:
            # A parameter, a side tensor or a batch input: at rest as far as this block is concerned.
            self.where[name, token(place)] = (self.view.storages.root(name), "rest")
            self.sizes.setdefault((self.view.storages.root(name), "rest"), self.view.size(name, place))
        key = self.where[name, token(place)]
        self.last_use[key] = index
        return key

    def _make(self, name: str, place: Places, index: int) -> _Key:
        key = (name, token(place))
        self.where[name, token(place)] = key
        self.sizes[key] = self.view.size(name, place)
        self.made[key] = index
        self.last_use[key] = index
        return key

    def at_end(self, name: str) -> _Key:
        """The storage of an output as it leaves."""
        return self.where.get((name, self.have.get(name, "")), (name, "rest"))

    def most_of(self, name: str) -> int:
        """The largest storage that a tensor was converted to."""
        return max((self.sizes[key] for key in self.made if key[0] == name), default=0)

    def _convert(self, index: int, step: Convert) -> None:
        source = self._use(step.tensor, step.before, index)
        action = conversion(step.have, step.want).forward
        # A slice of any dim but the first has gaps, and most ops that read it copy it first.
        view_only = action == "" or (action == "slice" and step.want == Split(0))
        if view_only:
            self.where[step.tensor, token(step.after)] = source
        else:
            self._make(step.tensor, step.after, index)
        if step.tensor in self.view.block.outputs:
            self.have[step.tensor] = token(step.after)

    def _run(self, index: int, step: Run) -> None:
        op, in_places, out_places = step.op, self.view.inputs_of(step), self.view.outputs_of(step)
        keys = {name: self._use(name, place, index) for name, place in zip(op.inputs, in_places, strict=True)}
        for name, place in zip(op.outputs, out_places, strict=True):
            source = self.view.storages.source.get(name)
            if source in keys:
                keys[name] = keys[source]
                self.where[name, token(place)] = keys[source]
            else:
                keys[name] = self._make(name, place, index)
            self.have[name] = token(place)
        if counted_in_flops(op):
            if any(self.view.graph.tensors[name].role == "parameter" for name in op.inputs):
                self.deferred.update(
                    (keys[n], self.sizes[keys[n]]) for n in op.inputs if self.view.graph.tensors[n].role != "parameter"
                )
                self.put_off += sum(self.sizes[keys[name]] for name in op.outputs)
            self.expensive.update((keys[name], self.sizes[keys[name]]) for name in op.outputs)
        bordered = self._with_borders(index, step) if copies_input(step.strategies) else None
        # A fused loss keeps nothing but the logits, and their gradient takes their place.
        in_place = self.view.fused_loss and is_loss(op) and self.view.local.tensors[op.inputs[0]].dtype.itemsize < 4
        for name in () if in_place else op.saves:
            key = keys.get(name)
            if bordered is not None and name == op.inputs[0]:
                self.saved[bordered] = self.sizes[bordered]
                self.savers[bordered] = index
                continue
            # What lies at rest is there anyway; a parameter that was gathered for this use is not.
            if key is not None and not (key[1] == "rest" and self._lies_at_rest(key[0])):
                self.saved[key] = self.sizes[key]
                self.savers.setdefault(key, index)
        if op.outputs:
            sizes = [self.view.size(n, p) for n, p in zip(op.inputs, in_places, strict=True)]
            out = op.outputs[0]
            mine = self.view.size(out, out_places[0])
            if op.saved_extra_bytes and not in_place:
                # What autograd keeps besides goes with the largest tensor of the op, such as a loss's logits.
                largest = max(
                    (*zip(op.inputs, in_places, strict=True), *zip(op.outputs, out_places, strict=True)),
                    key=lambda pair: self.view.graph.tensors[pair[0]].size_bytes,
                )
                share = self.view.size(*largest) / max(1, self.view.graph.tensors[largest[0]].size_bytes)
                self.extra[index] = int(op.saved_extra_bytes * share)
            if self.view.whole_scores and is_attention(op):
                tensors = [self.view.graph.tensors[name] for name in op.inputs[:3]]
                scores, besides = attention_bytes(tensors, sizes[:3])
                if besides:
                    self.extra[index] = besides
                    key = (op.outputs[0], "scores")
                    self.sizes[key] = self.expensive[key] = scores
                    self.made[key] = self.last_use[key] = index
            by_class = any(strategy.special == "vocab_cross_entropy" for strategy in step.strategies)
            wide = op.inputs and self.view.wide_loss
            width = self.view.local.tensors[op.inputs[0]].dtype.itemsize if wide else 4
            self.scratch[index] = (0, 0) if in_place else scratch_bytes(op, sizes, mine, width)
            if by_class and not in_place:
                # It keeps the softmax in float32, and computes from logits and to their gradient in float32 too.
                logits = self.view.local.tensors[op.inputs[0]].dtype
                self.extra[index] = sizes[0] * 4 // min(4, logits.itemsize)
                self.scratch[index] = (self.extra[index],) * 2 if logits.itemsize < 4 else (0, 0)
            if bordered is not None:
                forward, backward = self.scratch[index]
                self.scratch[index] = forward, backward + self.sizes[bordered]

    def _with_borders(self, index: int, step: Run) -> _Key:
        """The copy of the op's first input in between its neighbours' borders."""
        name = step.op.inputs[0]
        key = (name, f"borders of {index}")
        share = widening(step.strategies, self.view.graph.tensors[name])
        self.sizes[key] = int(self.view.size(name, self.view.inputs_of(step)[0]) * share)
        self.made[key] = self.last_use[key] = index
        return key

    def _lies_at_rest(self, name: str) -> bool:
        return self.view.graph.tensors[name].role in ("parameter", "input", "buffer")

    def forward_peak(self, saving: bool, keeping: Container[_Key] = ()) -> int:
        live = {(name, ""): self.sizes[name, ""] for name in self.view.block.inputs if (name, "") not in self.saved}
        if not saving:
            live = {(name, ""): self.sizes[name, ""] for name in self.view.block.inputs}
        ends: dict[int, list[_Key]] = {}
        for key, index in self.last_use.items():
            if not (saving and key in self.saved) and key not in keeping:
                ends.setdefault(index, []).append(key)
        makes: dict[int, list[_Key]] = {}
        for key, index in self.made.items():
            makes.setdefault(index, []).append(key)
        total = peak = sum(live.values())
        for index in range(len(self.view.steps)):
            for key in makes.get(index, ()):
                live[key] = self.sizes[key]
                total += self.sizes[key]
            extra = self.extra.get(index, 0)
            peak = max(peak, total + extra + self.scratch.get(index, (0, 0))[0])
            if saving:
                total += extra
            for key in ends.get(index, ()):
                total -= live.pop(key, 0)
        return peak

    def backward_peaks(self, accumulate: bool) -> tuple[int, int]:
        """Walk the steps in reverse; `live` counts gradients made less saved storages released, `whole` is the sum of
        parameter gradients so far. Returns the most of `live`, and of both."""
        graph, view = self.graph, self.view
        gradients: dict[tuple[str, str], int] = {}  # (tensor, placement) -> buffer
        sizes: dict[int, int] = {}
        holders: dict[int, int] = {}
        live = peak = whole = whole_peak = 0
        whole_of: set[str] = set()
        fresh = iter(range(1 << 60))

        def note(temporary: int = 0, scratch: int = 0) -> None:
            nonlocal peak, whole_peak
            peak = max(peak, live + temporary + scratch)
            whole_peak = max(whole_peak, live + whole + scratch)

        def hold(tensor: str, place: str, buffer: int) -> None:
            gradients[tensor, place] = buffer
            holders[buffer] = holders.get(buffer, 0) + 1

        def release(tensor: str, place: str) -> None:
            nonlocal live
            buffer = gradients.pop((tensor, place), None)
            if buffer is not None:
                holders[buffer] -= 1
                if not holders[buffer]:
                    live -= sizes[buffer]

        def new(size: int) -> int:
            nonlocal live
            buffer = next(fresh)
            sizes[buffer] = size
            live += size
            return buffer

        def contribute(tensor: str, placement: Places, buffer: int | None) -> None:
            """A gradient arrives: `buffer` when it is shared with another tensor's, else a new one."""
            nonlocal live
            place = token(placement)
            size = view.size(tensor, placement)
            own = buffer is None
            if own:
                buffer = new(size)
            note()
            if (tensor, place) not in gradients:
                hold(tensor, place, buffer)
                return
            # Two contributions are added: into the first where nobody else holds it, else into a new buffer.
            if holders[gradients[tensor, place]] > 1:
                release(tensor, place)
                hold(tensor, place, new(size))
                note()
            if own:
                live -= size

        for name in view.block.outputs:
            if graph.tensors[name].requires_grad and name not in view.block.inputs:
                place = self.have.get(name, "")
                hold(name, place, new(self.sizes[self.at_end(name)]))
        note()
        parameters = set(view.block.parameters)
        for index in range(len(view.steps) - 1, -1, -1):
            step = view.steps[index]
            if isinstance(step, Convert):
                buffer = gradients.get((step.tensor, token(step.after)))
                if buffer is not None:
                    alias = conversion(step.have, step.want).backward in ("", "slice")
                    contribute(step.tensor, step.before, buffer if alias else None)
                    release(step.tensor, token(step.after))
                continue
            op, in_places, out_places = step.op, view.inputs_of(step), view.outputs_of(step)
            arrived = [gradients.get((n, token(p))) for n, p in zip(op.outputs, out_places, strict=True)]
            if not op.no_grad and (any(b is not None for b in arrived) or graph.loss in op.outputs):
                passed = arrived[0] if _passes_gradient(op, graph, view.storages) else None
                temporary = 0
                for name, place in zip(op.inputs, in_places, strict=True):
                    tensor = graph.tensors[name]
                    if not tensor.requires_grad:
                        continue
                    if name in parameters:
                        temporary += view.size(name, place) if accumulate else 0
                        whole += 0 if name in whole_of else view.size(name, place)
                        whole_of.add(name)
                        continue
                    same = passed is not None and tensor.numel == graph.tensors[op.outputs[0]].numel
                    contribute(name, place, passed if same else None)
                note(temporary, self.scratch.get(index, (0, 0))[1])
            for name, place in zip(op.outputs, out_places, strict=True):
                release(name, token(place))
            live -= self.extra.get(index, 0)
            for key, saver in self.savers.items():
                if saver == index and key in self.made:
                    live -= self.saved[key]
        return max(peak, 0), max(whole_peak, 0)


def _passes_gradient(op: Op, graph: Graph, storages: Storages) -> bool:
    """The gradient of the (first) output is that of the inputs of the same size, with no copy."""
    name = base_name(op.target)
    if name in ("add", "add_"):
        return True
    return name in VIEWS and name not in ("slice", "select", "split", "split_with_sizes", "chunk", "unbind")
