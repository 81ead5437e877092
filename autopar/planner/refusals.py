"""What a problem refuses before any search: pinned degrees that contradict each other, the batch, the model or the cluster."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..plan_validate import nearest_divisors
from ..schedule.orders import schedule_named
from .roles import MOST_AXES, can_be_axes, can_have, core_ops

if TYPE_CHECKING:
    from .problem import Problem


def check_pins(problem: Problem) -> None:
    """ValueError names the first contradiction, and what could be pinned instead."""
    _check_stream(problem)
    _check_batch(problem)
    _check_axes(problem)
    _check_degrees(problem)
    _check_tensor(problem)
    _check_roles(problem)


def _check_stream(problem: Problem) -> None:
    """What the runtime refuses of weights in versions (plan_validate.py), whatever the stages are."""
    schedule, precision = problem.constraints.schedule, problem.graph.precision
    if schedule is not None and not schedule_named(schedule).flushes and precision != "float32":
        raise ValueError(
            f"schedule={schedule!r} computes with versions of the weights in float32, but precision is {precision!r}; set "
            "precision to 'float32', or choose a schedule with steps"
        )


def _check_batch(problem: Problem) -> None:
    pinned, rows = problem.constraints, problem.graph.batch_size
    if pinned.data and rows % pinned.data:
        raise ValueError(
            f"data={pinned.data} does not divide the batch of {rows} rows; data could be "
            f"{nearest_divisors(rows, pinned.data)}, or capture with another batch"
        )
    if pinned.microbatches and rows % ((pinned.data or 1) * pinned.microbatches):
        per_rank = rows // (pinned.data or 1)
        raise ValueError(
            f"microbatches={pinned.microbatches} does not divide the {per_rank} rows of each data rank "
            f"({rows} rows over data={pinned.data or 1}); microbatches could be "
            f"{nearest_divisors(per_rank, pinned.microbatches)}"
        )
    for name in ("data", "microbatches"):
        if (getattr(pinned, name) or 1) == 1:
            continue
        conflict = problem.batch_conflict if name == "data" else problem.time_conflict
        if conflict:
            raise ValueError(
                f"{name}={getattr(pinned, name)}: the rows of {problem.graph.name}'s batch depend on each other: "
                f"{conflict}; set {name}=1"
            )
    if pinned.zero == 3 and pinned.data == 1:
        raise ValueError("zero=3 shards parameters over the data axis, but data=1; set zero=0, or data above 1")


def _check_axes(problem: Problem) -> None:
    """How many model axes there would be."""
    pinned = problem.constraints
    wanted = [*pinned.roles, *([("tensor", pinned.tensor)] if (pinned.tensor or 1) > 1 else [])]
    if len(wanted) > MOST_AXES:
        words = " and ".join(f"{name}={degree}" for name, degree in wanted)
        raise ValueError(f"{words} are {len(wanted)} model axes, and searches make {MOST_AXES} at most; set one to 1")


def _check_degrees(problem: Problem) -> None:
    pinned, world = problem.constraints, problem.cluster.world_size
    given = {name: getattr(pinned, name) for name in ("data", "tensor", "pipeline") if getattr(pinned, name)}
    roles = dict(pinned.roles)
    is_whole = len(given) == 3 or (len(roles) == MOST_AXES and {"data", "pipeline"} <= given.keys())
    given |= roles
    if pinned.pipeline and pinned.pipeline > len(problem.graph.blocks):
        raise ValueError(
            f"pipeline={pinned.pipeline}, but {problem.graph.name} has {len(problem.graph.blocks)} blocks and each stage "
            f"needs one; pipeline can be at most {len(problem.graph.blocks)}"
        )
    product = 1
    for degree in given.values():
        product *= degree
    words = " x ".join(f"{name}={degree}" for name, degree in given.items())
    if len(given) > 1:
        words += f" = {product}"
    if is_whole and product != world:
        raise ValueError(f"{words}, but the cluster has {world} devices; change a degree, or leave one out")
    each = product // (pinned.pipeline or 1)
    if (problem.cluster.hosts or problem.space.unlike) and not is_whole and product <= world and world % each == 0:
        return  # stages may have different numbers of devices, each a multiple of the other degrees
    if world % product:
        raise ValueError(
            f"{words}, which does not divide the cluster's {world} devices; the product could be "
            f"{nearest_divisors(world, product)}"
        )


def _check_tensor(problem: Problem) -> None:
    pinned = problem.constraints
    if (pinned.tensor or 1) == 1 or problem.splits(pinned.tensor, pinned.data or 1):
        return
    dims = sorted({size for t in problem.graph.parameters for size in t.shape if size > 1})
    world = problem.cluster.world_size
    possible = [t for t in range(2, world + 1) if world % t == 0 and problem.splits(t, 1)]
    raise ValueError(
        f"tensor={pinned.tensor}: no op of {problem.graph.name} that uses a parameter can be split {pinned.tensor} "
        f"ways; its parameters' dims are {', '.join(map(str, dims)) or 'none'}; tensor could be "
        f"{' or '.join(map(str, [1, *possible]))} on {world} devices"
    )


def _check_roles(problem: Problem) -> None:
    pinned, graph, world = problem.constraints, problem.graph, problem.cluster.world_size
    ops, data = problem.distinct_ops, pinned.data or 1
    for name, degree in pinned.roles:
        if can_have(name, graph, ops, degree, data):
            continue
        possible = [n for n in range(2, world + 1) if world % n == 0 and can_have(name, graph, ops, n, data)]
        split, nothing = _SPLITS[name]
        core = core_ops(name, graph, ops)
        if not core and not possible:
            raise ValueError(f"{name}={degree}: {graph.name} has {nothing}; leave {name} out")
        shapes = sorted({" x ".join(map(str, graph.tensors[op.inputs[0]].shape)) for op in core})
        raise ValueError(
            f"{name}={degree}: {split} of {graph.name} cannot be split {degree} ways"
            + (f" (they take {' and '.join(shapes)})" if core and name == "context" else "")
            + f"; {name} could be {' or '.join(map(str, [1, *possible]))} on {world} devices"
        )
    if len(pinned.roles) == MOST_AXES and not can_be_axes(problem.model_axes(_product(problem)), graph, ops, data):
        words = " and ".join(f"{name}={degree}" for name, degree in pinned.roles)
        raise ValueError(f"{words}: {graph.name} has ops that cannot be split both ways at once; leave one of them out")


def _product(problem: Problem) -> int:
    return math.prod(degree for _, degree in problem.constraints.roles)


# What an axis of a role splits, and what a graph has where there is nothing for it to do.
_SPLITS = {
    "context": (
        "the positions",
        "no sequence to split: neither attention nor products with a weight on [batch, positions, features]",
    ),
    "expert": ("the experts", "no experts: no op of it routes rows to groups of weights"),
}
