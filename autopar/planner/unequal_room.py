"""Which devices of an unequal cluster the stages of a pipeline may take, in which order: a graph of what is taken.

Hosts of one kind are alike, so a pipeline takes them in the order of their ranks. It goes through the cluster bloc by
bloc. A bloc is one kind of hosts, of which a stage takes whole hosts or an aligned part of one (in large clusters half, in
small ones of equal devices any part); or several kinds that are neighbours in speed, cut into as many equal units (some hosts
of each) as their numbers have in common, of which a stage takes one or more, and shares its rows among unlike replicas. Blocs
may come in any order:

    state    (kinds that are used up, the bloc that is open, how many of its devices are taken)
    move     the devices of one more stage                                                           `Room.moves`

So every path from nothing taken to everything taken is an order of the devices along the pipeline with its stages.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..cluster.spec import Cluster

# In larger clusters the parts of hosts that stages have are halves, and blocs are of one kind, of two or of all.
MAX_WHOLE_PARTS = 16

State = tuple[frozenset[int], tuple[int, ...], int]
START: State = (frozenset(), (), 0)


@dataclass(frozen=True, slots=True)
class Move:
    """The ranks of one more stage, in ascending order, and the state behind it.

    kind: groups of equal kind cost the same. joined: whether the next stage begins on the same host.
    """

    ranks: tuple[int, ...]
    kind: tuple
    after: State
    joined: bool


class Room:
    """The states and moves of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        hosts: list[dict[int, list[int]]] = [{} for _ in cluster.kinds]
        for rank in range(cluster.world_size):
            hosts[cluster.kind_number(rank)].setdefault(cluster.host(rank), []).append(rank)
        # Per kind, the ranks of each host.
        self.hosts = [list(mine.values()) for mine in hosts]
        peaks = [max(kind.device.flops_per_s.values()) for kind in cluster.kinds]
        self._by_speed = sorted(range(len(peaks)), key=lambda kind: peaks[kind])
        self._moves: dict[State, tuple[Move, ...]] = {}
        self._mixed: dict[tuple[int, ...], list[list[int]]] = {}

    @property
    def num_kinds(self) -> int:
        return len(self.hosts)

    def is_end(self, state: State) -> bool:
        return len(state[0]) == self.num_kinds

    def moves(self, state: State) -> tuple[Move, ...]:
        """All ways to take the devices of one more stage."""
        if state not in self._moves:
            self._moves[state] = tuple(self._find(state))
        return self._moves[state]

    def pipelines(self, most: int, state: State = START) -> Iterator[tuple[Move, ...]]:
        """Every way to take all devices in at most so many stages."""
        for move in self.moves(state) if most else ():
            if self.is_end(move.after):
                yield (move,)
            else:
                for rest in self.pipelines(most - 1, move.after):
                    yield (move, *rest)

    def states(self) -> list[State]:
        """All states but the end, so that each stands after those that its moves lead to."""
        seen: dict[State, int] = {START: 0}
        found = [START]
        for state in found:
            for move in self.moves(state):
                taken = seen[state] + len(move.ranks)
                if move.after not in seen and not self.is_end(move.after):
                    found.append(move.after)
                    seen[move.after] = taken
        return sorted(found, key=lambda state: -seen[state])

    def left(self, state: State) -> int:
        """Devices not taken yet."""
        used, _, taken = state
        return self.cluster.world_size - taken - sum(len(host) for kind in used for host in self.hosts[kind])

    @functools.cached_property
    def blocs(self) -> tuple[tuple[int, ...], ...]:
        """Single kinds, then two that are neighbours in speed (in small clusters any number), then all."""
        count = self.num_kinds
        small = self.cluster.world_size <= MAX_WHOLE_PARTS
        spans = [
            self._by_speed[a:b]
            for a, b in itertools.combinations(range(count + 1), 2)
            if small or b - a <= 2 or b - a == count
        ]
        return tuple(tuple(sorted(span)) for span in sorted(spans, key=len))

    def _find(self, state: State) -> Iterator[Move]:
        used, bloc, taken = state
        if bloc:
            yield from self._of_bloc(used, bloc, taken)
            return
        for bloc in self.blocs:
            if used.isdisjoint(bloc):
                yield from self._of_bloc(used, bloc, 0)

    def _of_bloc(self, used: frozenset[int], bloc: tuple[int, ...], taken: int) -> Iterator[Move]:
        units = self._units(bloc)
        width = len(units[0])
        first, inside = divmod(taken, width)
        if len(bloc) == 1:
            for size in range(1, width - inside + (inside > 0)):
                if self._is_part(width, inside, size):
                    ranks = tuple(units[first][inside : inside + size])
                    joined = inside + size < width
                    yield Move(ranks, (bloc, size), self._after(used, bloc, taken + size), joined)
        if inside == 0:
            for count in _counts(len(units) - first):
                ranks = tuple(sorted(itertools.chain(*units[first : first + count])))
                size = count * width
                yield Move(ranks, (bloc, size), self._after(used, bloc, taken + size), False)

    def _is_part(self, width: int, inside: int, size: int) -> bool:
        """Whether a stage may have so many devices of a host, `inside` of which are taken."""
        small = self.cluster.world_size <= MAX_WHOLE_PARTS
        if small and not self.cluster.hosts:
            return True
        return width % size == 0 and inside % size == 0 and (small or 2 * size >= width)

    def _after(self, used: frozenset[int], bloc: tuple[int, ...], taken: int) -> State:
        units = self._units(bloc)
        if taken == len(units) * len(units[0]):
            return (used | set(bloc), (), 0)
        return (used, bloc, taken)

    def _units(self, bloc: tuple[int, ...]) -> list[list[int]]:
        """The ranks of each unit of a bloc: of a host, or of hosts of each kind."""
        if len(bloc) == 1:
            return self.hosts[bloc[0]]
        if bloc not in self._mixed:
            self._mixed[bloc] = self._mix(bloc)
        return self._mixed[bloc]

    def _mix(self, bloc: tuple[int, ...]) -> list[list[int]]:
        count = math.gcd(*(len(self.hosts[kind]) for kind in bloc))
        units: list[list[int]] = [[] for _ in range(count)]
        for kind in bloc:
            hosts = self.hosts[kind]
            each = len(hosts) // count
            for i, unit in enumerate(units):
                unit += itertools.chain(*hosts[i * each : (i + 1) * each])
        return units


def _counts(most: int) -> list[int]:
    """Powers of two, and all of them."""
    return sorted({*(2**e for e in range(most.bit_length()) if 2**e <= most), most})
