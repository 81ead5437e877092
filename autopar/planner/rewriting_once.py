"""Rewrites on many devices: all of them together, in the chosen plan's own shape, where a gain can be expected at all.

Making the rewritten graph takes longer there than it is often worth, so what rewrites could save is bounded first, from the
prices of the ops that they replace. No product is expected to run faster than the best one of the graph does with the whole
batch, or at half of the device's peak where that is more: at r flops a second,

    saved <= sum over the replaced ops of  seconds - flops / r           for what is no product, flops = 0    `most_saved_s`

of all ranks of a stage together, for each microbatch. What joining costs (copies of weights, slices) is left out. Where that
is less than LEAST_SHARE of the step, or the time that is left is too short, the graph stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from ..capture.rewrites import LINEAR
from ..cost.model import CostModel
from ..graph import Graph, Op
from ..plan import Candidate, Plan, Prediction, tensor_axes
from ..report.words import plan_in_words
from .chains import LayoutChains
from .judge import Judge
from .moves import Moves
from .problem import Problem, Shape
from .relief import Relief
from .sketch import Rows, Sketch

# What rewrites must be able to save of a step to be tried.
LEAST_SHARE = 0.05
LIKELY = 0.5
# Process seconds that rewriting takes, per rewrite (and for the survey afterwards per so many) and op of the graph.
REWRITE_S, SURVEY = 5e-6, 30


def rewriting_s(graph: Graph, groups: Sequence[tuple[str, ...]]) -> float:
    """About how long it takes to make the graph after all of these."""
    return REWRITE_S * (sum(map(len, groups)) + SURVEY) * len(graph.ops)


def most_saved_s(problem: Problem, plan: Plan, groups: Sequence[tuple[str, ...]]) -> float:
    """Of a step of `plan`, by the stages together on average."""
    graph, costs = problem.graph, problem.costs
    assert isinstance(costs, CostModel)
    shards = plan.stages[0].data * plan.microbatches
    # A model axis leaves a rank a part of each product, about as if there were so many more shares of the batch.
    finer = [n for n in (plan.stages[0].tensor, 1) if graph.batch_size % (shards * n) == 0]
    parts = shards * finer[0]

    def seconds(op: Op, parts: int) -> float:
        return sum(costs.op_s(op, None, shards=parts, precision=graph.precision))

    whole_s = [(op, seconds(op, 1)) for op in problem.distinct_ops if op.target == LINEAR]
    peak = problem.cluster.device.flops_per_s.get(graph.precision, 0.0)
    rate = max([_flops(graph, op) / time_s for op, time_s in whole_s if time_s > 0] + [LIKELY * peak])
    saved_s = 0.0
    for group in groups:
        ops = [graph.op[name] for name in group[0].partition(":")[2].split(",")]
        saved_s += len(group) * sum(
            max(0.0, seconds(op, parts) - _flops(graph, op) / parts / max(rate, 1.0)) for op in ops
        )
    ranks = plan.pipeline * (plan.stages[0].tensor / finer[0])
    return saved_s * plan.microbatches / ranks


def _flops(graph: Graph, op: Op) -> float:
    """Forward and backward, of the whole batch; 0 for what is no product."""
    if op.target != LINEAR:
        return 0.0
    inner = graph.tensors[op.inputs[0]].shape[-1]
    passes = 1 + sum(graph.tensors[name].requires_grad for name in op.inputs[:2])
    return 2.0 * passes * inner * math.prod(graph.tensors[op.outputs[0]].shape)


def planned_alike(problem: Problem, graph: Graph, plan: Plan) -> Plan | None:
    """The rewritten graph in the shape of `plan`, with as little recomputation as fits; None where it cannot be had."""
    sketch = Sketch.of(plan)
    if sketch is None or len(graph.blocks) < len(sketch.stops) or len(sketch.teams[0].axes) > 1:
        return None
    team = sketch.teams[0]
    own = replace(problem, graph=graph, costs=problem.costs.of_graph(graph), chains=LayoutChains(), kept=[])
    try:
        rows = Rows()
        if team.axes:
            shape = Shape(len(sketch.teams), team.data, team.tensor, plan.microbatches, plan.schedule, team.zero)
            chain = next(iter(own.chains.of(own, shape)))
            rows = Rows(chain.unique, (chain.index,))
        teams = tuple(replace(one, rows=rows, axes=tensor_axes(one.tensor)) for one in sketch.teams)
        sketch, judge = replace(sketch, teams=teams), Judge(own)
        if len(graph.blocks) != len(problem.graph.blocks):
            sketch = replace(sketch, stops=Moves(own, judge).balanced_stops(sketch, sketch.schedule, len(sketch.stops)))
        judged = Relief(judge)(sketch.plan(own.graph), plan.prediction.step_time_s)
        if judged is None or own.pins.refusal(judged.plan):
            return None
        judged.plan.validate(own.graph, own.cluster)
    except ValueError:  # nothing is legal in this shape
        return None
    peak_bytes = max(judged.peaks_bytes)
    row = Candidate(plan_in_words(judged.plan), judged.time_s, peak_bytes, "chosen")
    return replace(judged.plan, prediction=Prediction(judged.time_s, peak_bytes), candidates=(row,))
