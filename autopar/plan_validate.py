"""Whether a plan can run a graph on a cluster. Each error says the field, what it holds, what was expected, what to do.

The checks run from the outside in: the same model and world, the degrees, the stages, and last the layouts, so that the
first error shown is the one that explains the others.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import get_args

from .cluster.spec import Cluster
from .graph import Block, Graph
from .plan import SCHEMA, Layout, Plan, Recompute, Stage
from .schedule.orders import SCHEDULES, schedule_named
from .sharding.batch import batch_layout
from .sharding.flow import find_strategies
from .sharding.placement import PARTIAL, REPLICATED, Split, parse_placement
from .sharding.reasons import refusal
from .sharding.rows import stage_units
from .sharding.rule import divides
from .sharding.strategies import strategies

RECOMPUTE = get_args(Recompute)
_REMAKE = "make the plan again with autopar.search(graph, cluster)"


def validate_plan(plan: Plan, graph: Graph, cluster: Cluster) -> None:
    """ValueError unless `plan` can run `graph` on `cluster`."""
    graph = plan.graph_of(graph)
    _check_identity(plan, graph, cluster)
    _check_degrees(plan, graph)
    _check_stages(plan, graph)
    _check_schedule(plan, graph)
    _check_batch(plan, graph)
    _check_layouts(plan, graph)


def nearest_divisors(size: int, wanted: int) -> str:
    """The divisors of `size` next below and above `wanted`, in words."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    below = [d for d in divisors if d <= wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return " or ".join(map(str, below + above))


def _check_identity(plan: Plan, graph: Graph, cluster: Cluster) -> None:
    if plan.schema != SCHEMA:
        raise ValueError(f"plan.schema is {plan.schema}, this version of autopar runs {SCHEMA}; {_REMAKE}")
    if plan.model != graph.name:
        raise ValueError(f"plan.model is {plan.model}, the captured model is {graph.name}; {_REMAKE}")
    if plan.batch_size != graph.batch_size:
        raise ValueError(
            f"plan.batch_size is {plan.batch_size}, the captured example has {graph.batch_size} rows; "
            f"capture with {plan.batch_size} rows, or {_REMAKE}"
        )
    if plan.precision != graph.precision:
        raise ValueError(
            f"plan.precision is {plan.precision!r}, but {graph.name} was captured to compute in {graph.precision!r}; "
            f"capture with precision={plan.precision!r}, or {_REMAKE}"
        )
    if plan.fingerprint != graph.fingerprint:
        raise ValueError(
            f"plan.fingerprint is {plan.fingerprint}, the captured {graph.name} has {graph.fingerprint}: same class, "
            f"but other sizes, options or example shapes; {_REMAKE}"
        )
    if plan.world_size != cluster.world_size:
        raise ValueError(
            f"plan.world_size is {plan.world_size}, the cluster has {cluster.world_size} devices; "
            f"start {plan.world_size} ranks, or {_REMAKE}"
        )


def _check_degrees(plan: Plan, graph: Graph) -> None:
    if plan.schedule not in SCHEDULES:
        near = difflib.get_close_matches(plan.schedule, SCHEDULES, 1)
        raise ValueError(
            f"plan.schedule is {plan.schedule!r}, expected one of {', '.join(SCHEDULES)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if plan.microbatches < 1:
        raise ValueError(f"plan.microbatches is {plan.microbatches}, expected at least 1")
    if not plan.stages:
        raise ValueError(f"plan.stages is empty, expected stages that cover all {len(graph.blocks)} blocks")
    for s, stage in enumerate(plan.stages):
        _check_mesh(stage, f"plan.stages[{s}]")
    used = [rank for group in plan.groups for rank in group]
    if sorted(used) != list(range(plan.world_size)):
        sizes = {len(group) for group in plan.groups}
        if len(sizes) == 1 and len(used) != plan.world_size:
            first = plan.stages[0]
            raise ValueError(
                f"plan.stages: pipeline {plan.pipeline} x data {first.data} x tensor {first.tensor} = {len(used)}, "
                f"but plan.world_size is {plan.world_size}; the degrees must multiply to it"
            )
        strange = sorted({r for r in used if not 0 <= r < plan.world_size or used.count(r) > 1})
        missing = sorted(set(range(plan.world_size)) - set(used))
        raise ValueError(
            f"plan.stages: each rank of 0..{plan.world_size - 1} must stand in exactly one set of ranks; "
            + (f"ranks {', '.join(map(str, strange))} are out of range or stand in two" if strange else "")
            + (f"ranks {', '.join(map(str, missing))} stand in none" if missing and not strange else "")
        )


def _check_mesh(stage: Stage, at: str) -> None:
    """The fields of a stage that need nothing but the stage."""
    if stage.data < 1:
        raise ValueError(f"{at}.data is {stage.data}, expected at least 1")
    if any(degree < 2 for degree in stage.axes):
        raise ValueError(f"{at}.axes is {list(stage.axes)}, expected degrees of 2 and more; leave out axes of 1")
    if len(stage.ranks) != stage.data * stage.tensor:
        raise ValueError(
            f"{at}.ranks has {len(stage.ranks)} ranks, expected data {stage.data} x tensor {stage.tensor} = "
            f"{stage.data * stage.tensor}"
        )
    rows = [stage.ranks[d * stage.tensor : (d + 1) * stage.tensor] for d in range(stage.data)]
    for line in (*rows, *zip(*rows, strict=True)):
        if list(line) != sorted(line):
            raise ValueError(f"{at}.ranks: ranks {', '.join(map(str, line))} along one axis must ascend")
    if stage.zero not in (0, 1, 2, 3):
        raise ValueError(f"{at}.zero is {stage.zero!r}, expected 0, 1, 2 or 3")
    if stage.zero and stage.data == 1:
        raise ValueError(f"{at}.zero is {stage.zero}, which shards over the data axis, but data is 1; set zero to 0")
    if stage.zero_group and (stage.zero == 0 or stage.zero_group < 2 or stage.data % stage.zero_group):
        raise ValueError(
            f"{at}.zero_group is {stage.zero_group}, expected 0, or with zero 1 to 3 a divisor of data {stage.data} "
            "that is at least 2"
        )
    if stage.shares and (len(stage.shares) != stage.data or min(stage.shares) < 1):
        raise ValueError(
            f"{at}.shares is {list(stage.shares)}, expected at least one row for each of {stage.data} data ranks"
        )


def _check_schedule(plan: Plan, graph: Graph) -> None:
    """The schedule finds each stage where it looks for it, and stages of the same ranks fit together."""
    schedule = schedule_named(plan.schedule)
    try:
        schedule.check_stages(plan.pipeline, len(plan.stages))
    except ValueError as error:
        raise ValueError(f"plan.stages: {error}") from None
    lowest: dict[tuple[int, ...], int] = {}
    for s, stage in enumerate(plan.stages):
        at = f"plan.stages[{s}]"
        wanted = plan.groups[schedule.group_of(s, plan.pipeline)]
        if stage.ranks != wanted:
            raise ValueError(
                f"{at}.ranks is {list(stage.ranks)}, but schedule {schedule.name!r} runs stage {s} of {len(plan.stages)} "
                f"on ranks {list(wanted)}"
            )
        other = lowest.setdefault(stage.ranks, s)
        for name in ("data", "axes", "shares"):
            if getattr(stage, name) != getattr(plan.stages[other], name):
                raise ValueError(
                    f"{at}.{name} is {getattr(stage, name)}, but plan.stages[{other}].{name}, on the same ranks, is "
                    f"{getattr(plan.stages[other], name)}; the stages of one set of ranks have one mesh"
                )
    if not schedule.flushes:
        _check_stream(plan, graph)
    for name in graph.shared_parameters:
        users = [s for s, stage in enumerate(plan.stages) if _uses(graph, stage, name)]
        for s in users:
            other = next(o for o in users if plan.stages[o].ranks == plan.stages[s].ranks)
            for field in ("zero", "zero_group"):
                if getattr(plan.stages[s], field) != getattr(plan.stages[other], field):
                    raise ValueError(
                        f"plan.stages[{s}].{field} is {getattr(plan.stages[s], field)}, but plan.stages[{other}].{field} "
                        f"is {getattr(plan.stages[other], field)}, and both use {graph.tensors[name].fqn} on the same "
                        "ranks; make the two equal"
                    )


def _check_stream(plan: Plan, graph: Graph) -> None:
    """What weights in versions allow."""
    try:
        schedule_named(plan.schedule).check_microbatches(plan.pipeline, plan.microbatches)
    except ValueError as error:
        raise ValueError(f"plan.microbatches: {error}") from None
    for s, stage in enumerate(plan.stages):
        if stage.zero:
            raise ValueError(
                f"plan.stages[{s}].zero is {stage.zero}, but schedule {plan.schedule!r} keeps whole versions of the weights; "
                "set zero to 0"
            )
    for field, value, legal in (("precision", plan.precision, "float32"), ("offload", plan.offload, False)):
        if value != legal:
            raise ValueError(
                f"plan.{field} is {value!r}, but schedule {plan.schedule!r} computes with the versions of the weights as "
                f"they lie at rest; set {field} to {legal!r}, or choose a schedule with steps"
            )
    for name in graph.shared_parameters:
        users = [s for s, stage in enumerate(plan.stages) if _uses(graph, stage, name)]
        if len(users) > 1:
            raise ValueError(
                f"plan.schedule is {plan.schedule!r}, but stages {', '.join(map(str, users))} share "
                f"{graph.tensors[name].fqn}, and each stage has its own version of it; choose a schedule with steps, or cut "
                "the stages so that one has all its uses"
            )


def _uses(graph: Graph, stage: Stage, parameter: str) -> bool:
    return any(parameter in block.parameters for block in graph.blocks[stage.start : stage.stop])


def _check_stages(plan: Plan, graph: Graph) -> None:
    reached = 0
    for s, stage in enumerate(plan.stages):
        at = f"plan.stages[{s}]"
        if stage.start != reached:
            raise ValueError(f"{at}.start is {stage.start}, expected {reached}, where the stages before it end")
        if stage.stop <= stage.start:
            raise ValueError(
                f"{at}.stop is {stage.stop}, expected more than its start {stage.start}: a stage has blocks"
            )
        reached = stage.stop
    if reached != len(graph.blocks):
        raise ValueError(
            f"plan.stages[{len(plan.stages) - 1}].stop is {reached}, expected {len(graph.blocks)}: "
            f"{graph.name} has {len(graph.blocks)} blocks and the stages must cover them all"
        )
    for s, stage in enumerate(plan.stages):
        at = f"plan.stages[{s}]"
        if stage.recompute and len(stage.recompute) != stage.num_blocks:
            raise ValueError(
                f"{at}.recompute has {len(stage.recompute)} entries, expected one per block [{stage.start}, {stage.stop}), "
                "or none at all"
            )
        for i, choice in enumerate(stage.recompute):
            if choice not in RECOMPUTE:
                raise ValueError(
                    f"{at}.recompute[{i}] is {choice!r}, expected one of {', '.join(map(repr, RECOMPUTE))}"
                )


def _check_batch(plan: Plan, graph: Graph) -> None:
    """Microbatches cut the batch, the data ranks of each stage cut a microbatch, and rows may be parted at all."""
    if plan.batch_size % plan.microbatches:
        raise ValueError(
            f"plan.microbatches is {plan.microbatches}, which does not divide the batch of {plan.batch_size} rows; "
            f"plan.microbatches could be {nearest_divisors(plan.batch_size, plan.microbatches)}"
        )
    rows = plan.batch_size // plan.microbatches
    for s, stage in enumerate(plan.stages):
        at = f"plan.stages[{s}]"
        if stage.shares and sum(stage.shares) != rows:
            raise ValueError(
                f"{at}.shares is {list(stage.shares)}, {sum(stage.shares)} rows together; expected the {rows} rows of a "
                f"microbatch (batch {plan.batch_size} / microbatches {plan.microbatches}), such as "
                f"{list(_in_proportion(stage.shares, rows))}"
                if rows >= stage.data
                else f"{at}.shares is {list(stage.shares)}, but a microbatch has {rows} rows for {stage.data} data ranks; "
                "use fewer microbatches or a smaller data degree"
            )
        if not stage.shares and rows % stage.data:
            whole = plan.batch_size % stage.data == 0
            advice = (
                f"plan.microbatches could be {nearest_divisors(plan.batch_size // stage.data, plan.microbatches)}"
                if whole
                else f"data must divide the batch: {nearest_divisors(plan.batch_size, stage.data)}"
            )
            uneven = list(_in_proportion((1,) * stage.data, rows)) if rows >= stage.data else None
            raise ValueError(
                f"{at}.data is {stage.data}: data {stage.data} x microbatches {plan.microbatches} = "
                f"{stage.data * plan.microbatches} does not divide the batch of {plan.batch_size} rows; {advice}"
                + (f", or {at}.shares {uneven}" if uneven else "")
            )
        units = stage_units(plan, stage)
        layout = batch_layout(graph, units) if units > 1 else None
        conflict = layout and (layout.time_conflict if plan.microbatches > 1 else layout.conflict)
        if conflict:
            field, value = ("microbatches", plan.microbatches) if plan.microbatches > 1 else ("data", stage.data)
            where = "plan" if plan.microbatches > 1 else at
            raise ValueError(
                f"{where}.{field} is {value}, but the rows of {graph.name}'s batch depend on each other: {conflict}"
            )


def _in_proportion(shares: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """`rows` shared out nearly as `shares` are, at least one each; the first ones get what is left over."""
    found = [max(1, rows * share // sum(shares)) for share in shares]
    while sum(found) > rows:
        found[found.index(max(found))] -= 1
    order = sorted(range(len(found)), key=lambda i: rows * shares[i] % sum(shares), reverse=True)
    for i in range(rows - sum(found)):
        found[order[i % len(order)]] += 1
    return tuple(found)


def _check_layouts(plan: Plan, graph: Graph) -> None:
    checked: set[tuple[tuple[int, ...], int, int]] = set()
    leaving: list[tuple[str, ...]] | None = None
    of_ranks: dict[tuple[int, ...], dict[tuple[str, int], tuple[str, str]]] = {}
    for s, stage in enumerate(plan.stages):
        at = f"plan.stages[{s}]"
        if len(stage.layouts) != len(stage.axes):
            raise ValueError(
                f"{at}.layouts has {len(stage.layouts)} entries, expected {len(stage.axes)}: one per model axis"
            )
        # From one set of ranks to another a tensor or a parameter may lie otherwise; the runtime hands it over accordingly.
        if s == 0 or plan.stages[s - 1].ranks != stage.ranks:
            leaving = None
        at_rest = of_ranks.setdefault(stage.ranks, {})
        for a, row in enumerate(stage.layouts):
            _check_row(plan, stage, row, f"{at}.layouts[{a}]")
        columns = list(zip(*stage.layouts, strict=True)) if stage.axes else [()] * stage.num_blocks
        for indices, block in zip(columns, graph.blocks[stage.start : stage.stop], strict=True):
            layouts = [plan.layouts[index] for index in indices]
            key = (indices, block.kind, stage_units(plan, stage))
            if key not in checked:
                for a in range(len(indices)):
                    _check_layout(plan, graph, stage, block, indices[: a + 1])
                checked.add(key)
            if leaving is not None:
                for index, layout, before in zip(indices, layouts, leaving, strict=True):
                    if before != layout.inputs:
                        raise ValueError(
                            f"plan.layouts[{index}].inputs (block {block.index}) is {list(layout.inputs)}, but the one "
                            f"before leaves {list(before)}; make the two equal"
                        )
            leaving = [layout.outputs for layout in layouts]
            for a, (index, layout) in enumerate(zip(indices, layouts, strict=True)):
                for name, token in zip(block.parameters, layout.parameters, strict=True):
                    field = f"plan.layouts[{index}].parameters"
                    there, said = at_rest.setdefault((name, a), (field, token))
                    if token != said:
                        raise ValueError(
                            f"{field} (block {block.index}) holds {graph.tensors[name].fqn} as {token}, but {there} "
                            f"as {said}; a parameter that two blocks of a stage share has one placement"
                        )


def _check_row(plan: Plan, stage: Stage, row: tuple[int, ...], at: str) -> None:
    if len(row) != stage.num_blocks:
        raise ValueError(
            f"{at} has {len(row)} entries, expected {stage.num_blocks}: one per block [{stage.start}, {stage.stop})"
        )
    for i, index in enumerate(row):
        if not 0 <= index < len(plan.layouts):
            raise ValueError(f"{at}[{i}] is {index}, expected an index into the {len(plan.layouts)} layouts")


def _check_layout(plan: Plan, graph: Graph, stage: Stage, block: Block, indices: tuple[int, ...]) -> None:
    """The layout of the last of these axes, given those of the axes before it."""
    index, axis = indices[-1], len(indices) - 1
    layout, at = plan.layouts[index], f"plan.layouts[{index}]"
    shards = stage_units(plan, stage)
    degree = stage.axes[axis]
    if layout.degree != degree:
        what = f"tensor {degree}" if len(stage.axes) == 1 else f"degree {degree} on model axis {axis}"
        raise ValueError(f"{at}.degree is {layout.degree}, but block {block.index}'s stage has {what}")
    outer = [plan.layouts[i] for i in indices[:-1]]
    _check_tokens(graph, block, layout, outer, at, shards)
    if len(layout.strategies) != len(block.ops):
        raise ValueError(
            f"{at}.strategies has {len(layout.strategies)} entries, expected {len(block.ops)}, one per op of block "
            f"{block.index}"
        )
    for i, (key, op) in enumerate(zip(layout.strategies, graph.block_ops(block), strict=True)):
        keys, degrees = [one.strategies[i] for one in outer], [one.degree for one in outer]
        around = tuple(zip(find_strategies(graph, op, keys, degrees, shards), degrees, strict=True))
        legal = [strategy.key for strategy in strategies(graph, op, layout.degree, shards, around)]
        if key not in legal:
            inside = f", inside {' and '.join(map(repr, keys))} on the axes before," if outer else ""
            why = refusal(graph, op, key, layout.degree, shards, around)
            raise ValueError(
                f"{at}.strategies[{i}] is {key!r}, but {op.name} ({op.target} in {op.module or graph.name}){inside} "
                f"can run on {layout.degree} ranks only as {', '.join(legal)}{why and f': {why}'}"
            )


def _check_tokens(graph: Graph, block: Block, layout: Layout, outer: Sequence[Layout], at: str, shards: int) -> None:
    """Each placement token is one, and the degree divides what the axes before leave of the dim that it splits."""
    on_batch = batch_layout(graph, shards).placements if shards > 1 else {}
    for field in ("inputs", "outputs", "parameters"):
        names, tokens = getattr(block, field), getattr(layout, field)
        if len(names) != len(tokens):
            raise ValueError(
                f"{at}.{field} has {len(tokens)} entries, expected {len(names)}: block {block.index}'s {field} are "
                f"{', '.join(names) or 'none'}"
            )
        for i, (name, token) in enumerate(zip(names, tokens, strict=True)):
            try:
                placement = parse_placement(token)
            except ValueError as error:
                raise ValueError(f"{at}.{field}[{i}]: {error}") from None
            tensor = graph.tensors[name]
            if field == "parameters" and placement == PARTIAL:
                splits = "".join(f", S{dim}" for dim in range(len(tensor.shape)))
                raise ValueError(
                    f"{at}.{field}[{i}] is {token}: {tensor.fqn} of shape {tensor.shape} cannot rest in summands; it rests "
                    f"as one of R{splits}"
                )
            if not isinstance(placement, Split):
                continue
            if placement.dim >= len(tensor.shape):
                raise ValueError(
                    f"{at}.{field}[{i}] is {token}, but {tensor.fqn or name} of shape {tensor.shape} has no dim "
                    f"{placement.dim}"
                )
            cuts = [(on_batch.get(name, REPLICATED), shards)]
            cuts += [(parse_placement(getattr(one, field)[i]), one.degree) for one in outer]
            size = tensor.shape[placement.dim]
            for cut, parts in cuts:
                if isinstance(cut, Split) and cut.dim == placement.dim:
                    size //= parts
            units = max(1, size // placement.blocks)
            if not divides(tensor.shape, [*cuts, (placement, layout.degree)]):
                whose = "rank of the axes before, data rank" if outer else "data rank"
                raise ValueError(
                    f"{at}.{field}[{i}] is {token}: {tensor.fqn or name} has {size} along dim {placement.dim} on each "
                    f"{whose} and microbatch, which degree {layout.degree}"
                    f"{f' x {placement.blocks} blocks' if placement.blocks > 1 else ''} does not divide; "
                    f"the nearest tensor degrees that do are {nearest_divisors(units, layout.degree)}"
                )
