"""The heads of a model, between which PipeDream cuts it: sets of layers that contain all predecessors of their members.

A graph of long parallel branches has very many, each way of having come so far in every branch. Then, in this order:

1. What does not depend on the model's first input comes with the first layer that needs it and does, as in PipeDream's
   own states.
2. A layer before or after which every other one comes parts the graph, and the heads are those of its parts. Of parts
   with too many, those with the most first, only the two ends are heads: such a part is in one stage.

Reference: Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, section 3.1. The
second rule is ours.                                                                                       `heads_of`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..inputs.pipedream_text import ProfiledGraph

# Tables over pairs of heads are made.
MAX_HEADS = 2_000


@dataclass(frozen=True, slots=True)
class Heads:
    """Cumulative figures per head, smallest first; row 0 is the empty head.

    within[i, j]: head i is part of head j. output_bytes: of the tensors that leave a head.
    """

    within: np.ndarray
    time_s: np.ndarray
    parameter_bytes: np.ndarray
    activation_bytes: np.ndarray
    output_bytes: np.ndarray


def heads_of(graph: ProfiledGraph) -> Heads:
    """The heads of a profiled graph: all of them, or no more than MAX_HEADS by the rules above. ValueError: it has more even
    so, one after the other."""
    num = len(graph.nodes)
    before, ancestors = [0] * num, [0] * num
    for source, target in graph.edges:
        before[target] |= 1 << source
    # nodes are in a topological order
    for v in range(num):
        for u in _members(before[v]):
            ancestors[v] |= ancestors[u] | 1 << u
    found = _heads(before, ancestors, 0)
    if found is None:
        late = _late(ancestors)
        found = _heads(before, ancestors, late) or _fewer_heads(before, ancestors, late)
    found.sort(key=lambda head: (head.bit_count(), head))
    members = np.array([[h >> v & 1 for v in range(num)] for h in found], float)
    nodes = graph.nodes
    leaves = np.zeros_like(members)
    for source, target in graph.edges:
        leaves[:, source] = np.maximum(leaves[:, source], members[:, source] * (1 - members[:, target]))
    return Heads(
        within=(members @ (1 - members).T == 0) & ~np.eye(len(found), dtype=bool),
        time_s=members @ [n.forward_s + n.backward_s for n in nodes],
        parameter_bytes=members @ [n.parameter_bytes for n in nodes],
        activation_bytes=members @ [n.activation_bytes for n in nodes],
        output_bytes=leaves @ [n.activation_bytes for n in nodes],
    )


def chain_heads(
    time_s: Sequence[float],
    parameter_bytes: Sequence[float],
    activation_bytes: Sequence[float],
    output_bytes: Sequence[float],
) -> Heads:
    """The heads of a chain of layers: its prefixes."""
    sums = [np.concatenate([[0.0], np.cumsum(v)]) for v in (time_s, parameter_bytes, activation_bytes)]
    order = np.arange(len(sums[0]))
    return Heads(order[:, None] < order[None, :], *sums, np.concatenate([[0.0], output_bytes]))


def _members(bits: int) -> list[int]:
    return [v for v in range(bits.bit_length()) if bits >> v & 1]


def _late(ancestors: Sequence[int]) -> int:
    """Nodes that do not depend on the first one, as far as those that do need them."""
    early = sum(1 << v for v, of in enumerate(ancestors) if of & 1 or not v)
    needed = 0
    for v in _members(early):
        needed |= ancestors[v]
    return needed & ~early


def _heads(
    before: Sequence[int], ancestors: Sequence[int], late: int, start: int = 0, stop: int = -1
) -> list[int] | None:
    """Bit sets of all heads from `start` to `stop` (default: the whole graph), both with them; None if there are too many.
    late: nodes that come with the first one that needs them."""
    stop = (1 << len(before)) - 1 if stop < 0 else stop
    among = _members(stop & ~start & ~late)
    found, level = {start}, {start}
    while level:
        larger = set()
        for head in level:
            for v in among:
                if not head >> v & 1 and not before[v] & ~head & ~late:
                    larger.add(head | 1 << v | ancestors[v] & late)
        level = larger - found
        found |= level
        if len(found) > MAX_HEADS:
            return None
    return list(found)


def _fewer_heads(before: Sequence[int], ancestors: Sequence[int], late: int) -> list[int]:
    """The heads of the parts between those that every path goes through; of parts with too many, the ends."""
    parts = _parts(ancestors, late)
    ends = {end for part in parts for end in part}
    inside = [set(_heads(before, ancestors, late, *part) or ()) - ends for part in parts]
    room = MAX_HEADS - len(ends)
    if room < 0:
        raise ValueError(f"the model has more than {MAX_HEADS} places in a row to be cut at; join layers")
    for heads in sorted(inside, key=len):
        if len(heads) > room:
            break
        ends |= heads
        room -= len(heads)
    return list(ends)


def _parts(ancestors: Sequence[int], late: int) -> list[tuple[int, int]]:
    """(first head, last head) between nodes that every other one comes before or after."""
    everything = (1 << len(ancestors)) - 1
    descendants = [0] * len(ancestors)
    for v, of in enumerate(ancestors):
        for u in _members(of):
            descendants[u] |= 1 << v
    heads = {0, everything}
    for v, (of, to) in enumerate(zip(ancestors, descendants, strict=True)):
        if not late >> v & 1 and of | to | 1 << v | late == everything:
            heads |= {of, of | 1 << v}
    line = sorted(heads, key=int.bit_count)
    return list(zip(line, line[1:], strict=False))
