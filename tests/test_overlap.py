"""What travels while ranks compute, in the measured Timeline of real processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import nn

import autopar
from autopar.cluster.spec import Cluster
from autopar.timeline import TRANSFER_KINDS, Event, Timeline

WIDTH, ROWS, LAYERS = 512, 512, 4


class Branches(nn.Module):
    """Two branches of one input, as attention and the feed-forward layer of some transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (
            down(nn.functional.silu(up(norm(x)))) for norm, up, down in zip(self.norms, self.up, self.down, strict=True)
        )
        return x + first + second


def layers() -> nn.Sequential:
    parts = [part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 8))


def branches() -> nn.Sequential:
    return nn.Sequential(*(Branches() for _ in range(LAYERS)), nn.Linear(WIDTH, 8))


def measured(build: Callable[[], nn.Module] = layers, **pins) -> tuple[Timeline, list[float]]:
    """The joined timeline of a step, and the last losses."""
    torch.manual_seed(0)
    module = build()
    batch = (torch.randn(ROWS, WIDTH), torch.randint(0, 8, (ROWS,)))
    cluster = Cluster.preset("cpu", hosts=1, devices_per_host=2)
    degrees = {"data": 1, "tensor": 1, "pipeline": 1, "zero": 0, "recompute": "none"}
    loss = nn.functional.cross_entropy
    model = autopar.parallelize(module, batch, loss, cluster=cluster, **(degrees | pins))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        result = model(*batch)
        result.backward()
        losses.append(result.item())
        optimizer.step()
        optimizer.zero_grad()
    return model.timeline, losses


def meets(one: Event, others: list[Event]) -> bool:
    return any(other.start_s < one.end_s and one.start_s < other.end_s for other in others)


def computing(line: Timeline, rank: int) -> list[Event]:
    return [e for e in line.events if e.rank == rank and e.kind not in TRANSFER_KINDS | {"D", "O"}]


@pytest.mark.alone
def test_gradients_are_reduced_while_the_backward_runs(pool) -> None:
    """All buckets but the last set out in the midst of the backward, and no rank waits for more than what is left."""
    for line, _ in pool.run(measured, data=2, microbatches=2):
        for rank in (0, 1):
            reductions = [t for t in line.transfers if t.rank == rank and t.token == "all_reduce data"]
            backward = [e for e in line.events if e.rank == rank and e.kind == "B"][-1]
            assert len(reductions) > 1 and sum(t.bytes for t in reductions) > 4 * LAYERS * WIDTH**2
            early = [t for t in reductions if backward.start_s < t.start_s < backward.end_s]
            assert len(early) >= len(reductions) - 1, (backward, reductions)
            assert all(meets(t, [backward]) for t in early)
            assert line.hidden_s()[rank] > 0


def head_starts_s(line: Timeline, rank: int, axis: str) -> list[float]:
    """For each asynchronous collective of a rank on an axis, in order, how long it was on its way before the rank waited."""
    ways, waits = (
        sorted(e.start_s for e in events if e.rank == rank and e.token.endswith(f" {axis}"))
        for events in (line.transfers, line.waits)
    )
    return [wait - way for way, wait in zip(ways, waits, strict=True)]


@pytest.mark.alone
def test_parameters_are_gathered_ahead(pool) -> None:
    """While one block computes the next one's parameters come, in forwards and in backwards."""
    for line, _ in pool.run(measured, data=2, microbatches=2, zero=3):
        for rank in (0, 1):
            early = [start_s for start_s in head_starts_s(line, rank, "data") if start_s > 5e-4]
            # All but the first of each forward, and of each backward what stands in front of another block.
            blocks = LAYERS + 1
            assert len(early) >= 2 * 2 * (blocks - 2), (len(early), blocks)
            assert line.hidden_s()[rank] > 0


@pytest.mark.alone
def test_gradients_of_weights_hide_what_a_tensor_axis_sums(pool) -> None:
    """The gradient of a split product's input travels while that of its weight is computed, and the other branch's."""
    layout = {"*.up.*": "column", "*.down.*": "row"}
    for line, _ in pool.run(measured, branches, tensor=2, microbatches=1, layout=layout):
        for rank in (0, 1):
            starts = head_starts_s(line, rank, "tensor")
            assert len(starts) >= LAYERS and median(starts) > 1e-3, starts
            assert line.hidden_s()[rank] > 0


@pytest.mark.alone
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_messages_travel_while_stages_compute(pool, schedule: str) -> None:
    """A receive is posted before its turn and a send left behind, so both are under way during compute."""
    for line, _ in pool.run(measured, pipeline=2, microbatches=8, schedule=schedule):
        for rank, kinds in ((0, {"SA", "RG"}), (1, {"SG", "RA"})):
            found = [t for t in line.transfers if t.rank == rank]
            assert {t.kind for t in found} == kinds and len(found) == 16
            assert all(t.bytes == 4 * ROWS // 8 * WIDTH for t in found)
            # Nothing comes beside the first activation, and the last gradient has nothing left to hide behind.
            hidden = [t for t in found if meets(t, computing(line, rank))]
            assert len(hidden) >= len(found) - 2, set(found) - set(hidden)
            # What an instruction starts it does not wait for.
            sends = {e.token: e.duration_s for e in line.events if e.rank == rank and e.kind in ("SA", "SG")}
            ways = {t.token: t.duration_s for t in found if t.token in sends}
            assert median(sends[token] / ways[token] for token in ways) < 0.5


def test_transfers_are_kept_with_a_timeline() -> None:
    events = (Event(0, "0F0", 0.0, 2.0), Event(0, "0B0", 3.0, 5.0), Event(0, "0RG0<1", 2.0, 3.0))
    line = Timeline(events, 5.0, {}, (Event(0, "0RG0<1", 1.0, 4.0, 8), Event(0, "all_reduce", 1.5, 6.0, 4)))
    # of the way from 1 to 6, forward covers 1 to 2 and backward 3 to 5
    assert line.hidden_s() == {0: 3.0}
    assert line.busy_s() == {0: 4.0}
    # of which it stood still from 4.5 to 5
    waiting = replace(line, waits=(Event(0, "all_reduce", 4.5, 6.0),))
    assert Timeline.from_json(waiting.to_json()) == waiting
    assert waiting.hidden_s() == {0: 2.5}
