"""The simulator's step time by closed forms and short recurrences, for searches that ask many thousands of times.

S stages, M microbatches; f, b: forward and backward of a stage, c: a transfer to the next stage (or a gradient back).
Every stage and every direction of every link is a server that treats messages in order, so times are longest paths:

- GPipe. The forward sweep is a tandem queue of equal jobs over the servers f_0, c_0, f_1, ..., f_{S-1}. The longest
  path from server i at time r_i through the last one visits each server once and spends the other M - 1 jobs at the
  slowest: r_i + sum(t_i..t_last) + (M - 1) max(t_i..t_last), the maximum over i. The backward sweep is the same the
  other way.
- 1F1B. Iteration k runs, on every stage from the last to the first, B(k) and then F(k + depth). Its state is one clock
  per stage and per direction of each link. The iteration is max-plus linear in this state; so once a state equals an
  earlier one but for a shift that is the same everywhere, it repeats with that period, and the rest is skipped
  (Baccelli, Cohen, Olsder and Quadrat 1992, Synchronization and Linearity, section 3.7: powers of max-plus matrices).
- ZB-H1. The same with the input half in the place of B(k), and the weight half W(k - g) of stage g after it.
- The others. One pass over the compute instructions in an order that respects what each waits for; that order does not
  depend on the costs and is kept.

For equal stages without transfers both give (M - 1 + S)(f + b) (Narayanan et al. 2021, Megatron-LM, section 2.2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from autopar.cost.types import StageCost

from .instructions import Backward, BackwardInput, BackwardWeight, Forward
from .orders import schedule_named

# Shifts that agree to this share of the time gone by are equal: sums of doubles in another order.
_SAME = 1e-12
# Programs kept in order; a search asks for few shapes many times.
_KEPT_PROGRAMS = 64


def step_time_s(num_groups: int, microbatches: int, schedule: str, stage_costs: Sequence[StageCost]) -> float:
    """`simulate_program(build_program(...), stage_costs).step_time_s`, to rounding, without the walk.

    stage_costs: of every stage; as many for each group as the schedule runs, in the order of the stages.
    """
    chosen = schedule_named(schedule)
    chosen.check_stages(num_groups, len(stage_costs))
    closed_form = _LAST_BACKWARD.get(chosen.name)
    if closed_form is None:
        return _walk(num_groups, microbatches, schedule, stage_costs)
    ends, half = closed_form(stage_costs, microbatches), chosen.splits_backward
    return max(
        end + exposed_reduce_s(cost, half) + cost.optimizer_s for end, cost in zip(ends, stage_costs, strict=True)
    )


def exposed_reduce_s(cost: StageCost, half: bool = False) -> float:
    """What of the gradient reduction is seen if nothing but the stage's last backward (or weight half) hides it."""
    return unhidden_reduce_s(cost, half) + cost.reduce_model_s


def unhidden_reduce_s(cost: StageCost, half: bool = False) -> float:
    """The reduction over data less what the last backward hides: it starts inside it (half: inside its weight half)."""
    backward_s = cost.backward_weight_s if half else cost.backward_s
    return max(0.0, cost.reduce_s - min(cost.reduce_overlap_s, backward_s))


def lower_bound_s(num_stages: int, microbatches: int, schedule: str, stage_costs: Sequence[StageCost]) -> float:
    """A bound that no schedule of one stage per group, with whole backwards, beats: the longest of some paths that every
    step contains.

    For stage s: its first forward waits for the stages before it; its own work is M (f_s + b_s); between its last
    forward and the backward of that microbatch, as between its first forward and first backward, lies the round trip
    through the stages behind it; after its last backward the stages before it still have one to do.
    """
    assert len(stage_costs) == num_stages, (len(stage_costs), num_stages)
    schedule_named(schedule)
    round_trip_s = [0.0] * num_stages
    for s in range(num_stages - 2, -1, -1):
        later = stage_costs[s + 1]
        round_trip_s[s] = round_trip_s[s + 1] + 2 * stage_costs[s].send_s + later.forward_s + later.backward_s
    best_s = start_s = drain_s = 0.0
    for s, cost in enumerate(stage_costs):
        start_s = max(start_s, cost.prologue_s)
        drain_s = max(drain_s, exposed_reduce_s(cost) + cost.optimizer_s)
        once_s = cost.forward_s + cost.backward_s
        more_s = (microbatches - 1) * once_s
        first_or_last_s = (microbatches - 1) * max(cost.forward_s, cost.backward_s) + round_trip_s[s]
        best_s = max(best_s, start_s + once_s + max(more_s, first_or_last_s) + drain_s)
        start_s += cost.forward_s + cost.send_s
        drain_s += cost.backward_s + cost.send_s
    return best_s


_Unit = tuple[int, int, int, int, int, int]
"""(group, stage, 0 for F, 1 for B, 2 for I, 3 for W, the unit waited for or -1, the group told or -1, whose send_s)"""


@lru_cache(maxsize=_KEPT_PROGRAMS)
def _units(num_groups: int, microbatches: int, schedule: str, virtual: int) -> tuple[_Unit, ...]:
    """The compute instructions in an order in which each stands after those that it waits for."""
    chosen = schedule_named(schedule)
    rows = [list(chosen.order(group, num_groups, microbatches, virtual)) for group in range(num_groups)]
    num_stages = num_groups * virtual
    home = [chosen.group_of(stage, num_groups) for stage in range(num_stages)]
    # Where each forward, then each backward stands, by stage and microbatch.
    number = [-1] * (2 * num_stages * microbatches)
    waiting: dict[int, int] = {}
    units: list[_Unit] = []
    reached = [0] * num_groups
    ready = list(range(num_groups))
    while ready:
        group = ready.pop()
        for instruction in rows[group][reached[group] :]:
            kind, stage, m = _KINDS[type(instruction)], instruction.stage, instruction.microbatch
            before, after = (stage - 1, stage + 1) if kind == 0 else (stage + 1, stage - 1)
            told = awaited = -1
            if kind != 3:
                half = 0 if kind == 0 else num_stages
                if 0 <= before < num_stages and home[before] != group:
                    need = (half + before) * microbatches + m
                    awaited = number[need]
                    if awaited < 0:
                        waiting[need] = group
                        break
                if 0 <= after < num_stages and home[after] != group:
                    told = home[after]
                mine = (half + stage) * microbatches + m
                number[mine] = len(units)
                if mine in waiting:
                    ready.append(waiting.pop(mine))
            units.append((group, stage, kind, awaited, told, min(stage, after)))
            reached[group] += 1
    assert reached == [len(row) for row in rows], "the schedule waits for itself"
    return tuple(units)


_KINDS = {Forward: 0, Backward: 1, BackwardInput: 2, BackwardWeight: 3}


def _walk(num_groups: int, microbatches: int, schedule: str, costs: Sequence[StageCost]) -> float:
    """One pass over `_units`, then the ends of the groups as the simulator has them."""
    units = _units(num_groups, microbatches, schedule, len(costs) // num_groups)
    durations = [(c.forward_s, c.backward_s, c.backward_input_s, c.backward_weight_s) for c in costs]
    members: list[list[int]] = [[] for _ in range(num_groups)]
    for stage in range(len(costs)):
        members[schedule_named(schedule).group_of(stage, num_groups)].append(stage)
    clocks = [sum(costs[stage].prologue_s for stage in stages) for stages in members]
    links = [[0.0] * num_groups for _ in range(num_groups)]
    arrivals = [0.0] * len(units)
    ended: dict[int, tuple[int, float, bool]] = {}
    for index, (group, stage, kind, awaited, told, boundary) in enumerate(units):
        clock = clocks[group]
        if awaited >= 0 and arrivals[awaited] > clock:
            clock = arrivals[awaited]
        clocks[group] = clock = clock + durations[stage][kind]
        if told >= 0:
            link = links[group][told]
            links[group][told] = arrivals[index] = (link if link > clock else clock) + costs[boundary].send_s
        if kind in (1, 3):
            ended[stage] = (index, clock, kind == 3)
    step_s = 0.0
    for stages, clock in zip(members, clocks, strict=True):
        reduced_s = 0.0
        for stage in sorted(stages, key=ended.__getitem__):
            _, end_s, half = ended[stage]
            reduced_s = max(reduced_s, end_s) + unhidden_reduce_s(costs[stage], half)
            clock = max(clock, reduced_s) + costs[stage].reduce_model_s
        step_s = max(step_s, clock + sum(costs[stage].optimizer_s for stage in stages))
    return step_s


def _gpipe(costs: Sequence[StageCost], microbatches: int) -> list[float]:
    """When each stage's last backward ends."""
    more = microbatches - 1
    best_s = 0.0
    release_s = -1.0
    # Only a server that is released later than all before it can start the longest path.
    for first, cost in enumerate(costs):
        if cost.prologue_s > release_s:
            release_s = cost.prologue_s
            times = [t for c in costs[first:] for t in (c.forward_s, c.send_s)][:-1]
            best_s = max(best_s, release_s + sum(times) + more * max(times))
    ends = [0.0] * len(costs)
    total_s = slowest_s = 0.0
    for s in range(len(costs) - 1, -1, -1):
        if s < len(costs) - 1:
            total_s += costs[s].send_s
            slowest_s = max(slowest_s, costs[s].send_s)
        total_s += costs[s].backward_s
        slowest_s = max(slowest_s, costs[s].backward_s)
        ends[s] = best_s + total_s + more * slowest_s
    return ends


def _one_forward_one_backward(costs: Sequence[StageCost], microbatches: int) -> list[float]:
    """When each stage's last backward ends."""
    return _alternating(costs, microbatches, [c.backward_s for c in costs], None)


def _zero_bubble_h1(costs: Sequence[StageCost], microbatches: int) -> list[float]:
    """When each stage's last weight half ends."""
    weight_s = [c.backward_weight_s for c in costs]
    ends = _alternating(costs, microbatches, [c.backward_input_s for c in costs], weight_s)
    return [end + min(s, microbatches) * weight_s[s] for s, end in enumerate(ends)]


def _alternating(
    costs: Sequence[StageCost], microbatches: int, backward_s: list[float], weight_s: list[float] | None
) -> list[float]:
    """When each stage's last backward ends, or the last of `weight_s` that stands among its input halves."""
    num_stages, last = len(costs), len(costs) - 1
    forward_s = [c.forward_s for c in costs]
    send_s = [c.send_s for c in costs]
    # One state: clocks of the stages, then of the links s -> s + 1, then of the links s + 1 -> s. A link's clock is the
    # arrival of its last message, which is the one that the receiver needs next.
    state = [c.prologue_s for c in costs] + [0.0] * (2 * num_stages)
    up, down = num_stages, 2 * num_stages
    arrivals = [0.0] * microbatches
    for s in range(num_stages):
        clock, link = state[s], 0.0
        for m in range(min(num_stages - s, microbatches)):
            clock = max(clock, arrivals[m]) + forward_s[s]
            arrivals[m] = link = max(clock, link) + send_s[s]
        state[s], state[up + s] = clock, link
    backwards = range(last, -1, -1)
    # Iterations are alike from the first one in which every stage has a weight half, to the last in which all have
    # a forward.
    k, begin, full = 0, last if weight_s else 0, microbatches - num_stages
    anchor, anchor_k, renew_k = list(state), begin, begin + 1
    while k < microbatches:
        for s in backwards:
            clock = state[s]
            if s < last and state[down + s] > clock:
                clock = state[down + s]
            clock += backward_s[s]
            if s:
                link = state[down + s - 1]
                state[down + s - 1] = (link if link > clock else clock) + send_s[s - 1]
            if weight_s and k >= s:
                clock += weight_s[s]
            if k + num_stages - s < microbatches:
                if s and state[up + s - 1] > clock:
                    clock = state[up + s - 1]
                clock += forward_s[s]
                if s < last:
                    link = state[up + s]
                    state[up + s] = (link if link > clock else clock) + send_s[s]
            state[s] = clock
        k += 1
        if begin < k < full:
            if _shifted(anchor, state, num_stages):
                repeats = (full - k) // (k - anchor_k)
                k += repeats * (k - anchor_k)
                state = [now + repeats * (now - then) for now, then in zip(state, anchor, strict=True)]
                full = 0
            elif k == renew_k:
                # Brent's cycle finding: the anchor moves on at powers of two, so any period is found.
                anchor, anchor_k, renew_k = list(state), k, 2 * k - begin
        elif k == begin:
            anchor = list(state)
    return state[:num_stages]


def _shifted(before: list[float], after: list[float], num_stages: int) -> bool:
    """Whether all clocks of the state have advanced alike (the unused clocks of links past the last stage aside)."""
    shift = after[0] - before[0]
    slack = _SAME * after[0]
    for k in range(1, len(after)):
        if k % num_stages == num_stages - 1 and k >= num_stages:
            continue
        if abs(after[k] - before[k] - shift) > slack:
            return False
    return True


_LAST_BACKWARD = {"gpipe": _gpipe, "1f1b": _one_forward_one_backward, "zb-h1": _zero_bubble_h1}
