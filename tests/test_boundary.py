"""Hand-over between stages of any two meshes: what arrives means what was sent, and nothing travels twice.

The oracle says of every single index of a tensor which ranks hold it, straight from the definition of a split.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from loopback import run
from torch import Tensor

from autopar.plan import Plan, Stage
from autopar.runtime.boundary import Handover, Spread
from autopar.runtime.groups import build_groups
from autopar.runtime.routes import route
from autopar.runtime.transport import Transport
from autopar.schedule.instructions import ReceiveActivation, SendActivation
from autopar.sharding.axes import Places, absolute, nests
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Split

SHAPE = (48, 8, 6)


@dataclass(frozen=True)
class Case:
    """Several tensors of SHAPE that one boundary hands over."""

    microbatches: int
    senders: tuple[Spread, ...]
    receivers: tuple[Spread, ...]

    @property
    def plan(self) -> Plan:
        stages = [
            Stage(s, s + 1, side[0].ranks, side[0].degrees[0], side[0].degrees[1:])
            for s, side in enumerate((self.senders, self.receivers))
        ]
        world = {rank for stage in stages for rank in stage.ranks}
        return Plan("m", "f", len(world), SHAPE[0], self.microbatches, "1f1b", tuple(stages))


def random_places(draw: random.Random, counts: tuple[int, ...], on_batch: object) -> Places:
    """The batch axis as given, then any placements of the model axes that nest in it and divide."""
    options = [REPLICATED, PARTIAL, SHARED]
    options += [Split(dim, blocks) for dim in range(3) for blocks in (1, 2, 4, 12, 24)]
    while True:
        places = (on_batch, *(draw.choice(options) for _ in counts[1:]))
        if nests(SHAPE, absolute(places, counts), counts):
            return places


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    microbatches = draw.choice([1, 2])
    sides: list[tuple[Spread, ...]] = []
    on_batch = [draw.choice([Split(0), Split(0), Split(0, 2), Split(1), REPLICATED, SHARED, PARTIAL]) for _ in range(3)]
    first = 0
    for _ in range(2):
        while True:
            degrees = (draw.randint(1, 3), *(draw.choice([2, 2, 3]) for _ in range(draw.randint(0, 2))))
            shares = () if draw.random() < 0.5 else tuple(draw.choice([1, 1, 2]) for _ in range(degrees[0]))
            units = microbatches * (sum(shares) or degrees[0])
            counts = (units, *degrees[1:])
            wide = math.prod(degrees)
            fits = all(nests(SHAPE, (p,), (units,)) for p in on_batch)
            if fits and wide <= 6:
                break
        ranks = tuple(range(first, first + wide))
        first += wide
        places = [random_places(draw, counts, p) for p in on_batch]
        sides.append(tuple(Spread(SHAPE, microbatches, ranks, degrees, p, shares) for p in places))
    return Case(microbatches, *sides)


def holds(spread: Spread, rank: int, microbatch: int) -> list[Tensor]:
    """Per dim, the indices that the rank has of a microbatch, by definition."""
    data, *model = spread.coordinates(rank)
    shares = spread.shares or (1,) * spread.degrees[0]
    units = spread.microbatches * sum(shares)
    first = microbatch * sum(shares) + sum(shares[:data])
    counts = (units, *spread.degrees[1:])
    owned = [range(first, first + shares[data]), *([place] for place in model)]
    masks = [torch.ones(size, dtype=torch.bool) for size in SHAPE]
    for place, count, mine in zip(absolute(spread.placements, counts), counts, owned, strict=True):
        if isinstance(place, Split):
            index = torch.arange(SHAPE[place.dim])
            rest = SHAPE[place.dim] // (place.blocks * count)
            masks[place.dim] &= torch.isin(index // rest % count, torch.tensor(list(mine)))
    return [mask.nonzero().flatten() for mask in masks]


def summand(spread: Spread, rank: int, wholes: list[Tensor]) -> Tensor:
    """Which of the tensors that add up to the whole the rank has a part of; the whole where it is not in summands."""
    index, count = 0, 1
    for place, placement, degree in zip(spread.coordinates(rank), spread.placements, spread.degrees, strict=True):
        if placement == PARTIAL:
            index, count = index * degree + place, count * degree
    return sum(wholes[1:], wholes[0]) if count == 1 else sum(wholes[index + count :: count], wholes[index])


def local(spread: Spread, rank: int, microbatch: int, whole: Tensor) -> Tensor:
    return whole[torch.meshgrid(*holds(spread, rank, microbatch), indexing="ij")].contiguous()


def hand_over(case: Case, values: list[list[Tensor]]) -> dict[int, list[Tensor]]:
    """Stage 0 sends all microbatches, stage 1 receives them; by microbatch what this rank got."""
    groups = build_groups(case.plan)
    handovers = [Handover(*pair) for pair in zip(case.senders, case.receivers, strict=True)]
    mine = route(handovers, [values[0][0].dtype] * len(handovers), groups.rank)
    transport = Transport(groups, torch.device("cpu"), {(0, 1): mine})
    actions = [
        action
        for m in range(case.microbatches)
        for s, action in ((0, SendActivation(0, m, 1)), (1, ReceiveActivation(1, m, 0)))
        if s in groups.meshes
    ]
    transport.begin(actions)
    got = {}
    for action in actions:
        if isinstance(action, SendActivation):
            tensors = [
                local(spread, groups.rank, action.microbatch, summand(spread, groups.rank, parts))
                for spread, parts in zip(case.senders, values, strict=True)
            ]
            transport.send(action, tensors)
        else:
            got[action.microbatch] = transport.receive(action)
    transport.finish()
    return got


@pytest.mark.parametrize("chunk", range(10))
def test_what_arrives_means_what_was_sent(chunk: int) -> None:
    for seed in range(chunk * 30, chunk * 30 + 30):
        case = random_case(seed)
        generator = torch.Generator().manual_seed(seed)
        values = [[torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(12)] for _ in range(3)]
        found = run(hand_over, case.plan.world_size, case, values)
        for t, (spread, parts) in enumerate(zip(case.receivers, values, strict=True)):
            whole = sum(parts[1:], parts[0])
            for m in range(case.microbatches):
                totals: dict[tuple[int, ...], Tensor] = {}
                for rank in spread.ranks:
                    # Ranks that differ on PARTIAL axes only have summands of one part.
                    where = tuple(
                        c for c, p in zip(spread.coordinates(rank), spread.placements, strict=True) if p != PARTIAL
                    )
                    totals[where] = totals.get(where, 0) + found[rank][m][t]
                    expected = local(spread, rank, m, whole)
                    assert found[rank][m][t].shape == expected.shape
                for rank in spread.ranks:
                    where = tuple(
                        c for c, p in zip(spread.coordinates(rank), spread.placements, strict=True) if p != PARTIAL
                    )
                    torch.testing.assert_close(totals[where], local(spread, rank, m, whole))


def test_equal_meshes_send_each_tensor_once_to_the_counterpart() -> None:
    """One message per tensor, unpacked, to the rank at the same coordinates."""
    large = (1024, 64)
    for degrees, places in itertools.product(
        [(1,), (2,), (2, 2), (1, 4), (2, 2, 2)], [(Split(0), REPLICATED), (Split(0), Split(1)), (SHARED, Split(0))]
    ):
        placements = (places[0], *[places[1]] * (len(degrees) - 1))
        count = math.prod(degrees)
        sides = [Spread(large, 2, tuple(range(first, first + count)), degrees, placements) for first in (0, count)]
        for ways in (Handover(*sides), Handover(*sides).of_gradient()):
            there, here = ways.sender.ranks[0], ways.receiver.ranks[0]
            for place in range(count):
                mine = route([ways, ways], [torch.float32] * 2, there + place)
                assert [(m.peer, m.num_bytes, len(m.pieces)) for m in mine.sends] == [(here + place, 0, 1)] * 2
                assert not mine.receives and not mine.sums
                theirs = route([ways, ways], [torch.float32] * 2, here + place)
                assert [(m.peer, m.num_bytes, len(m.pieces)) for m in theirs.receives] == [(there + place, 0, 1)] * 2
                assert not theirs.sums and not theirs.sends


def test_nothing_is_received_twice_and_replicas_share_the_sending() -> None:
    """2 x 4 replicas to 8 data ranks: each row travels once, and every sender has one receiver."""
    sender = Spread((64, 512), 1, tuple(range(8)), (2, 4), (Split(0), REPLICATED))
    receiver = Spread((64, 512), 1, tuple(range(8, 16)), (8,), (Split(0),))
    routes = [route([Handover(sender, receiver)], [torch.float32], rank) for rank in range(16)]
    assert [len(r.sends) for r in routes[:8]] == [1] * 8
    assert [len(r.receives) for r in routes[8:]] == [1] * 8
    # Back: each of the 4 replicas needs the gradient of its 32 rows whole, from the 4 ranks that have 8 rows each.
    back = [route([Handover(sender, receiver).of_gradient()], [torch.float32], rank) for rank in range(16)]
    assert [len(r.receives) for r in back[:8]] == [4] * 8
    # Rows lie in one run on both sides, so that nothing is packed.
    assert all(m.num_bytes == 0 for r in (*routes, *back) for m in (*r.sends, *r.receives))


def test_small_pieces_for_one_peer_make_one_message() -> None:
    sender = Spread((8, 16), 1, (0, 1), (2,), (Split(0),))
    receiver = Spread((8, 16), 1, (2, 3), (1, 2), (Split(0), Split(1)))
    mine = route([Handover(sender, receiver)] * 3, [torch.float32, torch.int64, torch.bool], 0)
    assert [(m.peer, len(m.pieces)) for m in mine.sends] == [(2, 3), (3, 3)]
