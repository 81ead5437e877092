"""DAPPLE's search: where to cut, how often to replicate, and on which machines, for synchronous early-backward 1F1B.

A state is (next layer, devices used per machine, devices of the stage before). From it a stage takes the layers up to
j on m devices, chosen in one of three ways                                                          `placements`

    fresh    machines that nothing uses come first
    append   machines that are in use come first
    scatter  one device of each machine in turn

A pipeline of stages i = 0 .. S-1 with block_i = forward + backward of one microbatch, transfers x_i between stages and
gradient reductions r_i, M microbatches, is worth                                                    `score_s`

    (M - 1) max_i block_i + sum_i block_i + sum_i x_i + max_i (r_i - i max_j block_j)+

since stage i has done its last backward about i blocks before stage 0 and reduces meanwhile. Labels (max block, sums,
reductions) of a state that another label dominates are dropped, and so are those that cannot beat the best pipeline.

Reference: Fan et al., "DAPPLE: A Pipelined Data Parallel Approach for Training Large Models", PPoPP 2021, section 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Labels per state: the front of max block against the sums is short.
MAX_LABELS = 8


@dataclass(frozen=True, slots=True)
class Layers:
    """A chain of layers. block_s[m]: cumulative forward + backward of one microbatch on m replicas (0 in front);
    weight_bytes: cumulative; boundary_bytes[j]: what one microbatch hands on after j layers."""

    block_s: Mapping[int, np.ndarray]
    weight_bytes: np.ndarray
    boundary_bytes: np.ndarray

    @property
    def num(self) -> int:
        return len(self.weight_bytes) - 1


@dataclass(frozen=True, slots=True)
class Machines:
    """`count` machines of `devices` each; every device has a link of these rates within and between machines."""

    count: int
    devices: int
    inner_bytes_per_s: float
    outer_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Placed:
    """Layers [start, stop) on on[k] devices of machine k."""

    start: int
    stop: int
    on: tuple[int, ...]

    @property
    def replicas(self) -> int:
        return sum(self.on)


@dataclass(frozen=True, slots=True)
class _Label:
    stages: tuple[Placed, ...]
    slowest_s: float
    sums_s: float
    reduce_s: tuple[float, ...]

    def dominates(self, other: _Label) -> bool:
        return (
            self.slowest_s <= other.slowest_s
            and self.sums_s <= other.sums_s
            and len(self.reduce_s) == len(other.reduce_s)
            and all(a <= b for a, b in zip(self.reduce_s, other.reduce_s, strict=True))
        )


def placements(used: Sequence[int], machines: Machines, m: int, kinds: Sequence[str]) -> Iterator[tuple[int, ...]]:
    """The distinct ways of `kinds` to take m devices beside those used."""
    free = [machines.devices - count for count in used]
    seen: set[tuple[int, ...]] = set()
    for kind in kinds:
        taken = [0] * machines.count
        if kind == "scatter":
            left = m
            while left:
                for k in range(machines.count):
                    if left and taken[k] < free[k]:
                        taken[k] += 1
                        left -= 1
        else:
            in_use = [k for k in range(machines.count) if used[k]]
            unused = [k for k in range(machines.count) if not used[k]]
            left = m
            for k in unused + in_use if kind == "fresh" else in_use + unused:
                taken[k] = min(free[k], left)
                left -= taken[k]
        if tuple(taken) not in seen:
            seen.add(tuple(taken))
            yield tuple(taken)


def transfer_s(before: Placed, after: Placed, layers: Layers, machines: Machines) -> float:
    """A boundary activation, and its gradient back: what stays on a machine and what crosses, over all devices' links."""
    return _transfer_s(before.on, after.on, float(layers.boundary_bytes[after.start]), machines)


def _transfer_s(before: Sequence[int], after: Sequence[int], boundary_bytes: float, machines: Machines) -> float:
    """Of a boundary between stages that lie so on the machines."""
    have, want, size = sum(before), sum(after), 2 * boundary_bytes
    local = sum(min(a / have, b / want) for a, b in zip(before, after, strict=True) if a and b)
    lanes = min(have, want)
    local_s = size * local / (lanes * machines.inner_bytes_per_s)
    return local_s + size * max(0.0, 1 - local) / (lanes * machines.outer_bytes_per_s)


def reduction_s(stage: Placed, layers: Layers, machines: Machines) -> float:
    """The ring all-reduce of a stage's gradients."""
    return _reduction_s(stage.on, layers.weight_bytes[stage.stop] - layers.weight_bytes[stage.start], machines)


def _reduction_s(on: Sequence[int], size, machines: Machines):
    """Of so many bytes, one number or an array of them."""
    m = sum(on)
    one_machine = sum(1 for count in on if count) == 1
    return 2 * (m - 1) / m * size / (machines.inner_bytes_per_s if one_machine else machines.outer_bytes_per_s)


def score_s(stages: Sequence[Placed], layers: Layers, machines: Machines, microbatches: int) -> float:
    """The objective of a whole pipeline, from the definition."""
    blocks_s = [
        float(layers.block_s[one.replicas][one.stop] - layers.block_s[one.replicas][one.start]) for one in stages
    ]
    transfers_s = [transfer_s(*pair, layers, machines) for pair in itertools.pairwise(stages)]
    slowest_s = max(blocks_s)
    late_s = max(0.0, *(reduction_s(one, layers, machines) - i * slowest_s for i, one in enumerate(stages)))
    return (microbatches - 1) * slowest_s + sum(blocks_s) + sum(transfers_s) + late_s


def place(
    layers: Layers,
    machines: Machines,
    microbatches: int,
    replicas: Sequence[int] | None = None,
    num_stages: int | None = None,
    kinds: Sequence[str] = ("fresh", "append", "scatter"),
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[tuple[Placed, ...], float] | None:
    """(stages, score) that use all devices; None if none do. replicas: what a stage may have, by default anything.

    is_over: asked often; once it is true the best so far is the answer.
    """
    total = machines.count * machines.devices
    allowed = [m for m in range(1, total + 1) if m in layers.block_s and (replicas is None or m in replicas)]
    best: tuple[_Label, float] | None = None
    states: dict[tuple, list[_Label]] = {((0,) * machines.count, 0): [_Label((), 0.0, 0.0, ())]}
    # stage by stage: a state's labels all have the same number of stages
    for depth in range(1, (num_stages or min(layers.num, total)) + 1):
        grown: dict[tuple, list[_Label]] = {}
        ways: dict[tuple, list[tuple]] = {}
        for (used, start), labels in states.items():
            if is_over():
                return (best[0].stages, best[1]) if best else None
            left = total - sum(used)
            for m in allowed:
                ends = m == left
                if m > left or (num_stages is not None and ends != (depth == num_stages)):
                    continue
                stops = range(layers.num, layers.num + 1) if ends else range(start + 1, layers.num)
                if (used, m) not in ways:
                    ways[used, m] = [
                        (on, tuple(a + b for a, b in zip(used, on, strict=True)))
                        for on in placements(used, machines, m, kinds)
                    ]
                for on, now in ways[used, m]:
                    longer = _Longer(layers, machines, start, stops, on)
                    # in the order of stops, then labels: of equal pipelines the first counts
                    scores_s = [longer.scores_s(label, microbatches) for label in labels]
                    for i, stop in enumerate(stops):
                        for label, score in zip(labels, scores_s, strict=True):
                            if best is not None and score[i] >= best[1]:
                                continue
                            new = longer.label(label, i)
                            if ends:
                                best = (new, float(score[i]))
                            else:
                                _insert(grown.setdefault((now, stop, on), []), new)
        # the devices of the last stage count for the next transfer, so they are part of the state while it is open
        states = {}
        for (now, stop, _), labels in grown.items():
            states.setdefault((now, stop), []).extend(labels)
    return (best[0].stages, best[1]) if best else None


class _Longer:
    """Pipelines with one stage more, on these devices: from layer `start` up to each of `stops`."""

    def __init__(self, layers: Layers, machines: Machines, start: int, stops: range, on: tuple[int, ...]) -> None:
        self.layers, self.machines, self.start, self.stops, self.on = layers, machines, start, stops, on
        times, until = layers.block_s[sum(on)], slice(stops.start, stops.stop)
        self.block_s = times[until] - times[start]
        self.reduce_s = _reduction_s(on, layers.weight_bytes[until] - layers.weight_bytes[start], machines)
        self._transfers_s: dict[tuple[int, ...], float] = {}

    def scores_s(self, label: _Label, microbatches: int) -> np.ndarray:
        """What the pipelines are worth, by where the new stage stops."""
        slowest_s = np.maximum(label.slowest_s, self.block_s)
        late_s = np.maximum(0.0, self.reduce_s - len(label.stages) * slowest_s)
        for i, reduce_s in enumerate(label.reduce_s):
            late_s = np.maximum(late_s, reduce_s - i * slowest_s)
        return (microbatches - 1) * slowest_s + self._sums_s(label) + late_s

    def label(self, label: _Label, index: int) -> _Label:
        """The pipeline whose new stage ends at stop number `index`."""
        return _Label(
            (*label.stages, Placed(self.start, self.stops[index], self.on)),
            max(label.slowest_s, float(self.block_s[index])),
            float(self._sums_s(label)[index]),
            (*label.reduce_s, float(self.reduce_s[index])),
        )

    def _sums_s(self, label: _Label) -> np.ndarray:
        return label.sums_s + self.block_s + (self._transfer_s(label.stages[-1].on) if label.stages else 0.0)

    def _transfer_s(self, before: tuple[int, ...]) -> float:
        if before not in self._transfers_s:
            size = float(self.layers.boundary_bytes[self.start])
            self._transfers_s[before] = _transfer_s(before, self.on, size, self.machines)
        return self._transfers_s[before]


def _insert(labels: list[_Label], new: _Label) -> None:
    if any(old.dominates(new) for old in labels):
        return
    labels[:] = [old for old in labels if not new.dominates(old)]
    labels.append(new)
    if len(labels) > MAX_LABELS:
        labels.sort(key=lambda label: label.slowest_s + label.sums_s)
        labels.pop()
