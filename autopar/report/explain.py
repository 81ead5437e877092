"""A plan in words: degrees, stages, predictions, what its layouts amount to, and why the other candidates lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..graph import Block, Graph, Op
from ..plan import Layout, Plan, Stage
from ..sharding.flow import find_strategies
from ..sharding.placement import Split, parse_placement
from ..sharding.rows import stage_units
from ..sharding.strategy import Strategy
from .common_words import common_words
from .naming import describe_layouts
from .words import gib, plan_in_words, ranges, recompute_in_words, seconds, shares_in_words

_SCHEDULES = {
    "1f1b": "each stage alternates one forward and one backward (1F1B), so that few microbatches are in flight",
    "gpipe": "all forwards of the step run before its backwards (GPipe)",
    "interleaved": "each set of ranks runs several of them and alternates one forward and one backward (interleaved 1F1B), "
    "which shortens the wait at both ends of a step",
    "zb-h1": "gradients of inputs go before gradients of weights, which fill the waits (zero bubble, ZB-H1)",
    "zb-h2": "as ZB-H1, with up to twice the microbatches in flight and no wait but the first (zero bubble, ZB-H2)",
    "zb-v": "each set of ranks runs one on the way up and one on the way down, and gradients of weights fill the waits "
    "(zero bubble, ZB-V)",
    "pipedream": "batches go on without a flush, each backward with the weights of its forward (PipeDream)",
    "2bw": "batches go on without a flush, on two versions of the weights (PipeDream-2BW)",
}
_ZERO = (
    "every data rank holds all parameters, gradients and optimizer state of its stage",
    "parameters and optimizer state are sharded over {over}; whole in a step: parameters and gradients",
    "parameters, gradients and optimizer state are sharded over {over}; whole in a step: parameters",
    "parameters, gradients and optimizer state are sharded over {over}",
)
# By op, what splitting its weight along dim 0 or 1 is called.
_WEIGHT_SPLITS = {
    "linear": ("column parallel", "row parallel"),
    "embedding": ("vocabulary parallel", "hidden split"),
}


def explain_plan(plan: Plan, graph: Graph | None = None) -> str:
    """Some tens of lines of plain text; with the graph, also what the layouts amount to and do to each op."""
    graph = plan.graph_of(graph) if graph is not None else None
    parts = [f"{_degrees(plan, graph)}\n- in short: {common_words(plan, graph)}", _stages(plan)]
    if plan.rewrites:
        parts.append("Rewritten first: " + ", ".join(plan.rewrites) + ".")
    if plan.layouts:
        parts.append(_layouts(plan, graph))
    if plan.prediction:
        parts.append(_prediction(plan))
    if plan.candidates:
        parts.append(_candidates(plan))
    if plan.prediction and plan.prediction.changes:
        parts.append("What would change the choice:\n" + "\n".join(f"- {one}" for one in plan.prediction.changes))
    return "\n\n".join(parts)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns as wide as they need to be."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join((lines[0], "  ".join("-" * width for width in widths), *lines[1:]))


def _degrees(plan: Plan, graph: Graph | None) -> str:
    lines = [
        f"Plan for {plan.model} on {plan.world_size} device{'s' if plan.world_size > 1 else ''}: {plan_in_words(plan)}"
    ]
    if plan.pipeline > 1:
        lines.append(
            f"- pipeline {plan.pipeline}: the blocks are cut into {len(plan.stages)} stages; {_SCHEDULES[plan.schedule]}"
        )
    alike: dict[tuple, list[int]] = {}
    for s, stage in enumerate(plan.stages):
        alike.setdefault((stage.data, stage.axes, stage.shares), []).append(s)
    for stages in alike.values():
        lines += _mesh_lines(plan, graph, stages, len(alike) > 1)
    several = "es" if plan.microbatches > 1 else ""
    rows = plan.batch_size // plan.microbatches
    if len({(stage.data, stage.shares) for stage in plan.stages}) > 1 or plan.stages[0].shares:
        lines.append(f"- {plan.microbatches} microbatch{several} of {rows} row{'s' if rows > 1 else ''} per step")
    else:
        rows //= plan.stages[0].data
        lines.append(
            f"- {plan.microbatches} microbatch{several} of {rows} row{'s' if rows > 1 else ''} per data rank and step"
        )
    for level, group in sorted({(s.zero, s.zero_group % s.data) for s in plan.stages if s.data > 1}):
        over = f"groups of {group} data ranks, each of which holds a copy" if group else "the data ranks"
        lines.append(f"- ZeRO {level}: {_ZERO[level].format(over=over)}")
    if plan.offload:
        lines.append("- offload: parameters, gradients and optimizer state lie in host memory between their uses")
    if any("full" in stage.recompute for stage in plan.stages):
        lines.append(
            "- recompute: a stage marked full keeps only block inputs and computes each block again in the backward"
        )
    return "\n".join(lines)


def _mesh_lines(plan: Plan, graph: Graph | None, stages: Sequence[int], several: bool) -> list[str]:
    """What the data and tensor axes of these stages, which are alike, amount to."""
    stage = plan.stages[stages[0]]
    where = f" in stages {ranges(list(stages))}" if several else ""
    lines = []
    if stage.data > 1 and len(set(stage.shares)) > 1:
        rows = plan.batch_size // plan.microbatches
        lines.append(
            f"- data {stage.data}{where}: the data ranks have {', '.join(map(str, stage.shares))} of the {rows} rows of "
            "each microbatch"
        )
    elif stage.data > 1:
        rows = plan.batch_size // stage.data
        lines.append(f"- data {stage.data}{where}: each data rank has {rows} of the batch's {plan.batch_size} rows")
    if stage.tensor > 1 and graph is None:
        lines.append(f"- tensor {stage.tensor}{where}: each block's ops are shared out over {stage.tensor} ranks")
    elif stage.tensor > 1:
        mine = [plan.stages[s] for s in stages]
        used = [(b, i) for s in mine for b, i in zip(range(s.start, s.stop), s.layouts[0], strict=True)]
        blocks, layouts = [graph.blocks[b] for b, _ in used], [plan.layouts[i] for _, i in used]
        words = describe_layouts(graph, blocks, layouts, stage_units(plan, stage))
        lines.append(f"- {words.replace(':', f'{where}:', 1)}")
    return lines


def _stages(plan: Plan) -> str:
    unequal = len({(stage.data, stage.axes, stage.shares) for stage in plan.stages}) > 1
    rows = [
        (
            str(s),
            f"{stage.start}-{stage.stop - 1}" if stage.num_blocks > 1 else str(stage.start),
            ranges(stage.ranks),
            *([f"data {stage.data}{shares_in_words(stage)} x tensor {stage.tensor}"] if unequal else []),
            recompute_in_words(stage),
            str(stage.zero) if stage.zero_group % stage.data == 0 else f"{stage.zero} in {stage.zero_group}s",
            _layout_words(plan, stage),
        )
        for s, stage in enumerate(plan.stages)
    ]
    mesh = ("mesh",) if unequal else ()
    return table(("stage", "blocks", "ranks", *mesh, "recompute", "zero", "layout"), rows)


def _layout_words(plan: Plan, stage: Stage) -> str:
    if stage.tensor == 1:
        return "whole"
    counts = Counter(stage.layouts[0])
    return ", ".join(f"layout {index} x {count}" if count > 1 else f"layout {index}" for index, count in counts.items())


def _layouts(plan: Plan, graph: Graph | None) -> str:
    lines = ["Layouts on the tensor axis:"]
    for index, layout in enumerate(plan.layouts):
        block = first_block(plan, graph, index) if graph is not None else None
        entering, leaving = ((), ()) if block is None else ((graph, block.inputs), (graph, block.outputs))
        lines.append(
            f"- layout {index}: enters {boundary_in_words(layout.inputs, *entering)}, "
            f"leaves {boundary_in_words(layout.outputs, *leaving)}"
        )
        if block is not None:
            shards = next(
                stage_units(plan, stage) for stage in plan.stages if any(index in row for row in stage.layouts)
            )
            lines += [f"    {line}" for line in ops_in_words(graph, block, layout, shards)]
        else:
            counts = Counter(layout.strategies)
            lines.append("    op strategies: " + ", ".join(f"{key} x {count}" for key, count in counts.most_common()))
    return "\n".join(lines)


def boundary_in_words(tokens: tuple[str, ...], graph: Graph | None = None, names: tuple[str, ...] = ()) -> str:
    """Placements of a block's boundary, of tensors of these names, in words. Dim 1 of the residual stream is the sequence,
    its last is hidden; of images it is the channels, and space lies behind."""
    if not tokens:
        return "with the batch"
    words = []
    dims = [len(graph.tensors[name].shape) for name in names] if graph is not None else [3] * len(tokens)
    for token, num_dims in dict(zip(tokens, dims, strict=True)).items():
        placement = parse_placement(token)
        if isinstance(placement, Split):
            name = {2: "features", 3: "sequence parallel"}.get(num_dims, "channels") if placement.dim == 1 else ""
            name = "space" if num_dims > 3 and placement.dim > 1 else name
            words.append(f"split along dim {placement.dim}{name and f' ({name})'}")
        else:
            words.append({"R": "replicated", "P": "as partial sums", "H": "replicated with partial gradients"}[token])
    return " and ".join(words)


def first_block(plan: Plan, graph: Graph, index: int) -> Block | None:
    for stage in plan.stages:
        for row in stage.layouts:
            if index in row:
                return graph.blocks[stage.start + row.index(index)]
    return None


def ops_in_words(graph: Graph, block: Block, layout: Layout, shards: int) -> list[str]:
    """The ops that use parameters, attention and the loss: how each runs, by its common name where it has one."""
    placed = dict(zip(block.parameters, layout.parameters, strict=True))
    lines = []
    for op, key in zip(graph.block_ops(block), layout.strategies, strict=True):
        (strategy,) = find_strategies(graph, op, (key,), (layout.degree,), shards)
        names = [name for name in dict.fromkeys(op.inputs) if name in placed]
        words = _common_name(op, strategy, names)
        if not (names or words):
            continue
        wanted = dict(zip(op.inputs, strategy.inputs, strict=True))
        gathered = [name for name in names if placed[name][:1] == "S" and not isinstance(wanted[name], Split)]
        if gathered:
            words += f", {'weight' if len(gathered) == 1 else 'weights'} gathered at use"
        what = ", ".join(f"{graph.tensors[name].fqn or name} {placed[name]}" for name in names) or op.module or op.name
        lines.append(f"{what}: {op.target.split('.')[1]} {words or 'as ' + key}")
    return lines


_EXPERTS = {
    "n": "tokens split, all experts on every rank",
    "e": "experts split, results summed (expert parallel)",
    "n+e": "experts and tokens split, tokens exchanged by all-to-all (expert parallel)",
    "i": "each expert split (tensor parallel)",
}


def _common_name(op: Op, strategy: Strategy, parameters: list[str]) -> str:
    """What the literature calls this choice; "" where it has no name and no parameter."""
    kind = op.target.split(".")[1]
    if op.target == "autopar.routed_rows":
        return _EXPERTS.get(strategy.key.partition("@")[0], "whole on every rank")
    if strategy.special == "halo":
        return f"on a slice of dim {strategy.outputs[0].dim}, with borders of its neighbours"
    if strategy.special:
        return f"as {strategy.special.replace('_', ' ')}"
    wanted = dict(zip(op.inputs, strategy.inputs, strict=True))
    weight = wanted[parameters[0]] if parameters else None
    if isinstance(weight, Split) and kind in _WEIGHT_SPLITS and weight.dim < 2:
        return _WEIGHT_SPLITS[kind][weight.dim]
    out = strategy.outputs[0]
    if kind == "scaled_dot_product_attention" and isinstance(out, Split):
        return {0: "batch split", 1: "heads split"}.get(out.dim, "queries split (context parallel)")
    if not parameters:
        return ""
    if isinstance(out, Split):
        sequence = out.dim == 1 and not kind.startswith("conv")
        return f"on a slice of dim {out.dim}" + (" (sequence parallel)" if sequence else "")
    return "whole on every rank" if strategy.work == 1 else f"as {strategy.key}"


def bound_in_words(plan: Plan) -> str:
    """ "within 1.8% of the bound", "the best of the space", or "" where nothing is proved."""
    prediction = plan.prediction
    if prediction is None or prediction.lower_bound_s is None:
        return ""
    gap = prediction.step_time_s / prediction.lower_bound_s - 1
    return "proved to be the best of the space" if gap < 5e-4 else f"within {gap:.1%} of the bound"


def _prediction(plan: Plan) -> str:
    prediction = plan.prediction
    assert prediction is not None
    bound = bound_in_words(plan)
    lines = [
        f"Predicted: {seconds(prediction.step_time_s)} per step{f' ({bound})' if bound else ''}, "
        f"{gib(prediction.peak_memory_bytes)} on the fullest device."
    ]
    if prediction.terms:
        rows = [
            (one.name, seconds(one.seconds), f"{one.seconds / prediction.step_time_s:.1%}") for one in prediction.terms
        ]
        lines += ["", "Where the step goes (mean over stages):", table(("term", "time", "of the step"), rows)]
    if prediction.memory:
        rows = [(ranges(stages), *map(gib, parts)) for stages, parts in memory_rows(plan)]
        lines += ["", "Memory of a device at its peak:", table(("stage", *MEMORY_PARTS, "in all"), rows)]
    return "\n".join(lines)


MEMORY_PARTS = ("parameters", "gradients", "optimizer", "activations", "working")


def memory_rows(plan: Plan) -> list[tuple[list[int], tuple[int, ...]]]:
    """(stages, the bytes of each of MEMORY_PARTS and of all of them): stages in a row that need the same together."""
    rows: list[tuple[list[int], tuple[int, ...]]] = []
    for s, one in enumerate(plan.prediction.memory if plan.prediction else ()):
        sizes = (*(getattr(one, part) for part in MEMORY_PARTS), one.total)
        if rows and rows[-1][1] == sizes:
            rows[-1][0].append(s)
        else:
            rows.append(([s], sizes))
    return rows


def _candidates(plan: Plan) -> str:
    rows = [
        (
            "*" if one.verdict.startswith("chosen") else "",
            one.name,
            seconds(one.step_time_s),
            gib(one.peak_memory_bytes),
            one.verdict,
        )
        for one in plan.candidates
    ]
    return "Candidates (* marks the plan):\n" + table(("", "plan", "step", "memory", "verdict"), rows)
