"""The simulator against closed forms, the fast step time against the simulator, timelines, traces and tables."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost.types import StageCost
from autopar.plan import Plan, Stage
from autopar.report.summary import timeline_table
from autopar.report.trace import save_trace
from autopar.schedule.build import build_program
from autopar.schedule.check import ScheduleError
from autopar.schedule.instructions import Program, SendActivation, parse_instruction
from autopar.schedule.orders import SCHEDULES
from autopar.schedule.residency import residency
from autopar.schedule.step_time import lower_bound_s, step_time_s
from autopar.simulate import simulate, simulate_program, stage_peak_bytes
from autopar.timeline import Event, Timeline

ZERO = StageCost(*[0.0] * 4, 0, *[0.0] * 4, *[0] * 7)
PLAIN = ("gpipe", "1f1b")
# Schedule and stages per group, with a schedule of any number taking several.
CASES = [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2), *(("interleaved", v) for v in (1, 2, 3))]
degrees = (st.integers(1, 8), st.integers(1, 20), st.sampled_from(PLAIN))


def random_cost(rng: random.Random, transfer_s: float) -> StageCost:
    """Zeros and equal numbers are frequent: ties and idle parts are where recurrences go wrong."""

    def some(scale: float) -> float:
        return scale * rng.choice((0.0, 1.0, rng.random(), rng.random()))

    return StageCost(
        forward_s=some(1.0), backward_s=some(2.0), prologue_s=some(0.5), send_s=some(transfer_s),
        boundary_bytes=rng.randrange(1000), reduce_s=some(2.0), reduce_overlap_s=some(2.0), reduce_model_s=some(1.0),
        optimizer_s=some(1.0), parameter_bytes=rng.randrange(1000), gradient_bytes=rng.randrange(1000),
        optimizer_bytes=rng.randrange(1000), unsharded_bytes=rng.randrange(1000), activation_bytes=rng.randrange(1000),
        forward_peak_bytes=rng.randrange(1000), backward_peak_bytes=rng.randrange(1000),
        deferred_bytes=rng.randrange(1000),
    )  # fmt: skip


def split_cost(rng: random.Random, transfer_s: float) -> StageCost:
    cost = random_cost(rng, transfer_s)
    return replace(cost, backward_weight_s=cost.backward_s * rng.choice((0.0, 0.5, 1.0, rng.random())))


# ---------------------------------------------------------------------------------------------------- closed forms


@given(*degrees, st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_equal_stages_take_the_closed_form(num_stages: int, microbatches: int, name: str, f: int, b: int) -> None:
    costs = [replace(ZERO, forward_s=f, backward_s=b)] * num_stages
    line = simulate_program(build_program(num_stages, microbatches, name), costs)
    assert line.step_time_s == (microbatches - 1 + num_stages) * (f + b)
    assert line.bubble_fraction() == pytest.approx((num_stages - 1) / (microbatches + num_stages - 1), abs=1e-12)
    assert step_time_s(num_stages, microbatches, name, costs) == pytest.approx(line.step_time_s, rel=1e-12)
    assert lower_bound_s(num_stages, microbatches, name, costs) == pytest.approx(line.step_time_s, rel=1e-12)


@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_interleaved_bubble_is_that_of_one_small_stage(
    num_groups: int, rounds: int, virtual: int, f: int, b: int
) -> None:
    """Narayanan et al. 2021, section 2.2.2: t_pb = (p - 1)(t_f + t_b) / v, with t_f / v here the time of one stage."""
    costs = [replace(ZERO, forward_s=f, backward_s=b)] * (num_groups * virtual)
    microbatches = num_groups * rounds
    line = simulate_program(build_program(num_groups, microbatches, "interleaved", virtual=virtual), costs)
    assert line.step_time_s == microbatches * virtual * (f + b) + (num_groups - 1) * (f + b)
    assert step_time_s(num_groups, microbatches, "interleaved", costs) == line.step_time_s


@given(st.integers(1, 7), st.integers(0, 12), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_zero_bubble_h1_bubble_of_the_paper(num_groups: int, more: int, f: int, i: int, w: int) -> None:
    """Qi et al. 2023, table 1: (p - 1)(T_F + T_B - T_W), for W that fit where it puts them and m >= p."""
    w = min(w, f, i)
    costs = [replace(ZERO, forward_s=f, backward_s=i + w, backward_weight_s=w)] * num_groups
    line = simulate_program(build_program(num_groups, num_groups + more, "zb-h1"), costs)
    assert line.step_time_s == (num_groups + more) * (f + i + w) + (num_groups - 1) * (f + i - w)


@given(st.integers(1, 7), st.integers(0, 12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_zero_bubble_h2_never_waits_once_it_has_begun(num_groups: int, more: int, t: int) -> None:
    """Qi et al. 2023, section 3.2: no bubble for T_F = T_B = T_W, with up to 2P - 1 microbatches on every stage."""
    microbatches = 2 * num_groups - 1 + more
    costs = [replace(ZERO, forward_s=t, backward_s=2 * t, backward_weight_s=t)] * num_groups
    line = simulate_program(build_program(num_groups, microbatches, "zb-h2"), costs)
    for group, events in line.by_rank().items():
        compute = [e for e in events if e.kind in "FIW"]
        assert compute[0].start_s == group * t and compute[-1].end_s - compute[0].start_s == 3 * t * microbatches
        held = [sum((e.kind == "F") - (e.kind == "W") for e in compute[:n]) for n in range(len(compute))]
        assert max(held) <= 2 * num_groups - 1


@given(st.integers(1, 7), st.integers(0, 12), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_zero_bubble_v_never_waits_once_it_has_begun(num_groups: int, more: int, t: int) -> None:
    """Qi et al. 2023, section 6: no bubble for T_F = T_B = T_W; a step without its start-up is all work."""
    microbatches = 2 * num_groups - 1 + more
    costs = [replace(ZERO, forward_s=t, backward_s=2 * t, backward_weight_s=t)] * (2 * num_groups)
    line = simulate_program(build_program(num_groups, microbatches, "zb-v"), costs)
    work_s = 6 * t * microbatches
    assert line.step_time_s == work_s + (num_groups - 1) * t
    for group, events in line.by_rank().items():
        compute = [e for e in events if e.kind in "FIW"]
        assert compute[0].start_s == group * t and compute[-1].end_s == group * t + work_s


@given(st.integers(1, 8), st.integers(1, 20), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_evaluation_takes_the_closed_form(num_stages: int, microbatches: int, f: int, c: int) -> None:
    costs = [replace(ZERO, forward_s=f, send_s=c)] * num_stages
    line = simulate_program(build_program(num_stages, microbatches, "1f1b", training=False), costs)
    slowest = max(f, c) if num_stages > 1 else f
    assert line.step_time_s == num_stages * f + (num_stages - 1) * c + (microbatches - 1) * slowest


def test_transfers_occupy_their_link_and_not_the_stage() -> None:
    """Two stages, f = 1 and b = 0, messages of 3 s: the link is the bottleneck, and each stage only waits."""
    costs = [replace(ZERO, forward_s=1.0, send_s=3.0, boundary_bytes=7), replace(ZERO, forward_s=1.0)]
    line = simulate_program(build_program(2, 3, "gpipe", training=False), costs)
    spans = {event.token: (event.start_s, event.end_s, event.bytes) for event in line.events}
    assert spans["0F2"] == (2.0, 3.0, 0)
    assert [spans[f"0SA{m}>1"] for m in range(3)] == [(1.0, 4.0, 7), (4.0, 7.0, 7), (7.0, 10.0, 7)]
    assert [spans[f"1RA{m}<0"] for m in range(3)] == [(0.0, 4.0, 7), (5.0, 7.0, 7), (8.0, 10.0, 7)]
    assert line.step_time_s == 11.0


@pytest.mark.parametrize(
    ("overlap_s", "backward_s", "exposed_s"), [(0.0, 4.0, 5.0), (3.0, 4.0, 2.0), (3.0, 1.0, 4.0), (9.0, 9.0, 0.0)]
)
def test_the_reduction_hides_inside_the_last_backward_only(overlap_s, backward_s, exposed_s) -> None:
    cost = replace(
        ZERO, backward_s=backward_s, reduce_s=5.0, reduce_overlap_s=overlap_s, reduce_model_s=0.25, optimizer_s=0.5
    )
    line = simulate_program(build_program(1, 3, "1f1b"), [cost])
    (reduction,) = line.by_token()["0D"]
    assert reduction.duration_s == exposed_s + 0.25
    assert line.step_time_s == 3 * backward_s + exposed_s + 0.75


def test_events_respect_the_order_of_each_stage_and_of_messages() -> None:
    rng = random.Random(3)
    for _ in range(60):
        num_stages, microbatches = rng.randint(1, 5), rng.randint(1, 8)
        name, virtual = rng.choice(CASES)
        costs = [split_cost(rng, 1.0) for _ in range(num_stages * virtual)]
        program = build_program(num_stages, microbatches, name, virtual=virtual)
        line = simulate_program(program, costs)
        tokens = line.by_token()
        for row in program.actions:
            clock_s = 0.0
            for instruction in row:
                (event,) = tokens[str(instruction)]
                assert event.start_s >= clock_s and event.end_s >= event.start_s
                if event.kind in ("SA", "SG"):
                    (got,) = tokens[_receipt(instruction)]
                    assert got.end_s == max(got.start_s, event.end_s)
                    boundary = costs[min(instruction.stage, instruction.peer)]
                    assert event.bytes == boundary.boundary_bytes
                    assert event.duration_s == pytest.approx(boundary.send_s, abs=1e-12)
                else:
                    clock_s = event.end_s
        assert line.step_time_s == max(event.end_s for event in line.events)


def _receipt(send) -> str:
    kind = "RA" if isinstance(send, SendActivation) else "RG"
    return f"{send.peer}{kind}{send.microbatch}<{send.stage}"


# ------------------------------------------------------------------------------------------- fast step time, bound


def test_fast_step_time_equals_the_simulator_and_the_bound_holds() -> None:
    rng = random.Random(5)
    tight = 0
    for _ in range(500):
        num_stages, microbatches, name = rng.randint(1, 7), rng.randint(1, 32), rng.choice(PLAIN)
        transfer_s = rng.choice((0.0, 0.1, 1.0, 5.0))
        costs = [random_cost(rng, transfer_s) for _ in range(num_stages)]
        expected_s = simulate_program(build_program(num_stages, microbatches, name), costs).step_time_s
        assert step_time_s(num_stages, microbatches, name, costs) == pytest.approx(expected_s, rel=1e-9, abs=1e-12)
        bound_s = lower_bound_s(num_stages, microbatches, name, costs)
        assert bound_s <= expected_s * (1 + 1e-12)
        tight += bound_s >= expected_s * (1 - 1e-9)
    assert tight > 40


def test_fast_step_time_equals_the_simulator_for_every_schedule() -> None:
    rng = random.Random(8)
    for _ in range(250):
        num_groups, microbatches, (name, virtual) = rng.randint(1, 6), rng.randint(1, 20), rng.choice(CASES)
        transfer_s = rng.choice((0.0, 0.1, 1.0, 5.0))
        costs = [split_cost(rng, transfer_s) for _ in range(num_groups * virtual)]
        program = build_program(num_groups, microbatches, name, virtual=virtual)
        expected_s = simulate_program(program, costs).step_time_s
        assert step_time_s(num_groups, microbatches, name, costs) == pytest.approx(expected_s, rel=1e-9, abs=1e-12)


def test_fast_step_time_over_many_microbatches_where_it_skips() -> None:
    rng = random.Random(6)
    for num_stages in (1, 2, 3, 5):
        for transfer_s in (0.0, 0.3, 4.0):
            for name in ("1f1b", "zb-h1"):
                costs = [split_cost(rng, transfer_s) for _ in range(num_stages)]
                expected_s = simulate_program(build_program(num_stages, 400, name), costs).step_time_s
                assert step_time_s(num_stages, 400, name, costs) == pytest.approx(expected_s, rel=1e-9)


def test_a_step_time_wants_the_stages_that_the_schedule_runs() -> None:
    assert {name for name, _ in CASES} == {name for name, one in SCHEDULES.items() if one.flushes}
    with pytest.raises(ValueError, match="one of 1f1b, 2bw, gpipe, interleaved, pipedream, zb-h1, zb-h2, zb-v"):
        step_time_s(1, 1, "zigzag", [ZERO])
    with pytest.raises(ValueError, match="need 4 stages, not 3"):
        step_time_s(2, 1, "zb-v", [ZERO] * 3)


# -------------------------------------------------------------------------------------------------------- memory


def test_peak_memory_by_hand() -> None:
    cost = replace(
        ZERO, parameter_bytes=100, gradient_bytes=100, optimizer_bytes=200, unsharded_bytes=30, activation_bytes=10,
        forward_peak_bytes=4, backward_peak_bytes=6,
    )  # fmt: skip
    line = simulate_program(build_program(3, 5, "1f1b"), [cost] * 3)
    assert line.peak_memory_bytes == {0: 466, 1: 456, 2: 446}
    # GPipe: all activations before any gradient, 300 + 30 + 50 + 6, or one microbatch later 400 + 30 + 40 + 6.
    line = simulate_program(build_program(3, 5, "gpipe"), [cost] * 3)
    assert line.peak_memory_bytes == {0: 476, 1: 476, 2: 476}
    line = simulate_program(build_program(3, 5, "gpipe"), [replace(cost, activation_bytes=1000)] * 3)
    assert line.peak_memory_bytes == {0: 5336, 1: 5336, 2: 5336}
    # Buffers for the reduction over data are there from the start.
    line = simulate_program(build_program(3, 5, "gpipe"), [replace(cost, reduce_s=1.0)] * 3)
    assert line.peak_memory_bytes == {0: 486, 1: 486, 2: 486}
    line = simulate_program(build_program(3, 5, "gpipe", training=False), [cost] * 3)
    assert line.peak_memory_bytes == {0: 334, 1: 334, 2: 334}


@given(st.integers(1, 8), st.integers(1, 20), st.sampled_from((*PLAIN, "zb-h1", "zb-h2")), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_peak_memory_from_the_bound_equals_the_walk(num_stages: int, microbatches: int, name: str, seed: int) -> None:
    rng = random.Random(seed)
    costs = [random_cost(rng, 1.0) for _ in range(num_stages)]
    line = simulate_program(build_program(num_stages, microbatches, name), costs)
    for stage, cost in enumerate(costs):
        assert stage_peak_bytes(cost, name, stage, num_stages, microbatches) == line.peak_memory_bytes[stage]


# -------------------------------------------------------------------------------------------------------- public


class MadeUpCosts:
    """What a cost model answers: here, stage s takes s + 1 seconds."""

    def stage(self, plan: Plan, index: int) -> StageCost:
        return replace(ZERO, forward_s=index + 1.0, backward_s=index + 1.0, parameter_bytes=100 * (index + 1))


def test_peak_memory_from_residency_equals_the_walk() -> None:
    """Also where `residency` looks at fewer microbatches than there are."""
    rng = random.Random(9)
    for _ in range(200):
        num_groups, (name, virtual) = rng.randint(1, 5), rng.choice(CASES)
        microbatches = rng.choice((rng.randint(1, 40), rng.randint(1, 12) * num_groups))
        costs = [split_cost(rng, 1.0) for _ in range(num_groups * virtual)]
        line = simulate_program(build_program(num_groups, microbatches, name, virtual=virtual), costs)
        for group in range(num_groups):
            mine = [cost for s, cost in enumerate(costs) if SCHEDULES[name].group_of(s, num_groups) == group]
            found = residency(name, num_groups, microbatches, virtual, group)
            assert found.peak_bytes(mine) == line.peak_memory_bytes[group], (name, num_groups, microbatches, virtual)


def test_sixteen_thousand_ranks_fold_to_their_stages() -> None:
    per_stage = 4096
    stages = tuple(
        Stage(s, s + 1, tuple(range(s * per_stage, (s + 1) * per_stage)), per_stage // 8, (8,)) for s in range(4)
    )
    plan = Plan("m", "f", 4 * per_stage, per_stage * 8, 8, "1f1b", stages)
    line = simulate(None, plan, None, model=MadeUpCosts())
    assert len(line.peak_memory_bytes) == 16384 and line.peak_memory_bytes[16383] == 400
    assert set(line.by_rank()) == {0, 4096, 8192, 12288}

    small = Plan("m", "f", 4, 8, 4, "gpipe", tuple(Stage(s, s + 1, (2 * s, 2 * s + 1), 2) for s in range(2)))
    one = simulate(None, small, None, model=MadeUpCosts())
    every = simulate(None, small, None, model=MadeUpCosts(), all_ranks=True)
    costs = [MadeUpCosts().stage(small, s) for s in range(2)]
    assert every.step_time_s == one.step_time_s == step_time_s(2, 4, "gpipe", costs)
    assert set(every.by_rank()) == {0, 1, 2, 3}
    for events in every.by_token().values():
        assert len(events) == 2 and replace(events[0], rank=events[1].rank) == events[1]
    forward_only = simulate(None, small, None, model=MadeUpCosts(), training=False)
    assert forward_only.step_time_s == one.step_time_s / 2 == 9.0


def test_memory_of_several_stages_and_of_halves_by_hand() -> None:
    cost = replace(
        ZERO, parameter_bytes=100, gradient_bytes=100, optimizer_bytes=200, activation_bytes=10, forward_peak_bytes=4,
        backward_peak_bytes=6, deferred_bytes=3, reduce_s=1.0,
    )  # fmt: skip
    # Megatron's order for P = 2, V = 2: 5 and 3 forwards in flight at most, the last one's backward before any other.
    line = simulate_program(build_program(2, 4, "interleaved", virtual=2), [cost] * 4)
    assert line.peak_memory_bytes == {0: 800 + 50 + 6, 1: 800 + 30 + 6}
    # ZB-H1 for P = 3: 3, 2, 1 in flight. Group 1 puts off one W: F2 finds I0 .. W0 open; group 2 has F3 beside W1 and W2.
    line = simulate_program(build_program(3, 5, "zb-h1"), [cost] * 3)
    assert line.peak_memory_bytes == {0: 400 + 30 + 6, 1: 400 + 20 + 3 + 6, 2: 400 + 10 + 6 + 6}


def test_the_simulator_refuses_what_the_checker_refuses() -> None:
    rows = [list(row) for row in build_program(2, 2, "gpipe").actions]
    rows[1].remove(parse_instruction("1RA0<0"))
    with pytest.raises(ScheduleError, match="1F0"):
        simulate_program(Program(tuple(map(tuple, rows))), [ZERO, ZERO])


# ---------------------------------------------------------------------------------------- timeline, trace, table


def some_line(seed: int, all_ranks: bool = False) -> Timeline:
    rng = random.Random(seed)
    costs = [random_cost(rng, 0.5) for _ in range(3)]
    return simulate_program(build_program(3, 4, "1f1b"), costs, [(0, 1), (2, 3), (4, 5)], all_ranks=all_ranks)


def test_timeline_helpers() -> None:
    events = (
        Event(1, "1F0", 2.0, 4.0),
        Event(1, "1B0", 3.0, 5.0),
        Event(1, "1RA0<0", 0.0, 2.0),
        Event(0, "0F0", 0.0, 1.0),
        Event(0, "0SA0>1", 1.0, 9.0, 64),
        Event(0, "0O", 8.0, 10.0),
    )
    line = Timeline(events, 10.0, {0: 5, 1: 6})
    assert [e.token for e in line.by_rank()[1]] == ["1RA0<0", "1F0", "1B0"]
    assert line.by_token()["0F0"] == (events[3],)
    assert line.busy_s() == {0: 3.0, 1: 3.0} and line.idle_s() == {0: 7.0, 1: 7.0}
    assert line.bubble_fraction() == 0.7
    assert [e.kind for e in events] == ["F", "B", "RA", "F", "SA", "O"]
    assert Timeline((), 0.0).bubble_fraction() == 0.0


def test_timeline_json_is_exact_and_strict() -> None:
    for seed in range(5):
        line = some_line(seed, all_ranks=True)
        assert Timeline.from_json(line.to_json()) == line
    for text in ("", "{}", "[1]", '{"events": [[1, 2]], "step_time_s": 1, "peak_memory_bytes": {}}'):
        with pytest.raises(ValueError, match="not a timeline"):
            Timeline.from_json(text)


def test_trace_has_both_processes_and_slices_nest(tmp_path) -> None:
    predicted, measured = some_line(0), some_line(1, all_ranks=True)
    save_trace(tmp_path / "trace.json", predicted, measured)
    trace = json.loads((tmp_path / "trace.json").read_text())
    events = trace["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert processes == {1: "predicted", 2: "measured"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {name for (pid, _), name in threads.items() if pid == 1} == {
        "rank 0", "rank 0 sends activations", "rank 2", "rank 2 sends activations", "rank 2 sends gradients", "rank 4",
        "rank 4 sends gradients",
    }  # fmt: skip
    for pid, line in ((1, predicted), (2, measured)):
        slices = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        assert len(slices) == len(line.events)
        moved = sorted((e.token, e.bytes) for e in line.events)
        assert sorted((e["name"], e["args"]["bytes"]) for e in slices) == moved
        by_thread: dict[int, list] = {}
        for e in slices:
            assert (pid, e["tid"]) in threads and e["dur"] >= 0
            by_thread.setdefault(e["tid"], []).append(e)
        for found in by_thread.values():
            found.sort(key=lambda e: (e["ts"], e["dur"]))
            for a, b in zip(found, found[1:], strict=False):
                assert b["ts"] >= a["ts"] + a["dur"] - 1e-3
    save_trace(tmp_path / "one.json", None, measured)
    with pytest.raises(ValueError, match="predicted, measured or both"):
        save_trace(tmp_path / "none.json", None, None)


def test_table_puts_both_side_by_side() -> None:
    measured = some_line(2, all_ranks=True)
    events = tuple(replace(e, start_s=0.5 * e.start_s, end_s=0.5 * e.end_s) for e in some_line(2).events)
    peaks = {rank: size * 2 for rank, size in measured.peak_memory_bytes.items()}
    text = timeline_table(Timeline(events, 0.5 * measured.step_time_s, peaks), measured)
    rows = {line.split("  ")[0] or line.strip().split("  ")[0]: line for line in text.splitlines()[1:]}
    assert rows["step time"].endswith("-50.0%")
    assert rows["forward"].endswith("-50.0%") and rows["backward"].endswith("-50.0%")
    assert rows["send activation"].endswith(("s", "ms", "us"))
    assert all(rows[f"peak memory, rank {rank}"].endswith("+100.0%") for rank in range(6))
    assert "  -" in timeline_table(None, measured).splitlines()[1]
    with pytest.raises(ValueError, match="predicted, measured or both"):
        timeline_table(None, None)
