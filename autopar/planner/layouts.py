"""The best layout of one block on one model axis, exactly.

Given a block's ops o with their strategies s, its tensors T and a model axis of `degree` ranks, choose a strategy per
op and a placement at rest per parameter, so as to

    minimise    sum_o cost(o, s_o)                               compute, special algorithms    LayoutCosts.op_s
              + sum_T sum_{q wanted of T} conv(T, p_T, q)        each distinct conversion once  LayoutCosts.conversion_s
              + sum_w rest(w, p_w)                               optimizer, data reduction      LayoutCosts.rest_s
              + weight * bytes                                   (a) memory priced              memory_weight
    subject to  bytes <= limit                                   (b) memory bounded             memory_limit_bytes

where p_T is the placement that the producer's strategy gives T (REPLICATED for side tensors and batch inputs, as given
for block inputs, at rest for parameters) and the wanted ones are those that its consumers' strategies, and the block's
boundary, ask for. `layout_model` turns this into choices, `layout_program` into an integer program with transport
variables, `solve_block` returns its optimum, and `layout_price` recomputes what the returned layout costs from the
graph alone; every answer is held against it.

Reference: the intra-operator pass of Alpa (Zheng et al., OSDI 2022, section 4) has one-hot strategies and linearised
edges; the transport form, conversions paid once per tensor, and placements that state the gradient too are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..graph import Block, Graph
from ..plan import Layout
from ..sharding.placement import Placement
from .layout_costs import LayoutCosts
from .layout_model import BlockModel, block_model
from .layout_price import price_layout
from .layout_program import BlockProgram, Infeasible, Selection


@dataclass(frozen=True, slots=True)
class BlockSolution:
    """An optimal layout of one block.

    time_s: per microbatch and rank, forward and backward; memory_bytes: as `LayoutCosts` counts them.
    objective_s = time_s + memory_weight * memory_bytes >= lower_bound_s, which no layout of the block beats.
    relaxed: the linear relaxation was tight, no branching needed.
    """

    layout: Layout
    time_s: float
    memory_bytes: float
    objective_s: float
    lower_bound_s: float
    relaxed: bool


def solve_block(
    graph: Graph,
    block: Block,
    degree: int,
    costs: LayoutCosts,
    inputs: Sequence[Placement],
    outputs: Sequence[Placement],
    shared_parameters: Mapping[str, Placement] | None = None,
    memory_weight: float = 0.0,
    memory_limit_bytes: float | None = None,
) -> BlockSolution:
    """The cheapest layout of `block` on an axis of `degree` ranks.

    inputs, outputs: how `block.inputs` arrive and how `block.outputs` must leave; the conversion to the latter is
    charged here. shared_parameters: placement at rest of every parameter of the block that other blocks use as well.
    memory_weight: seconds that a byte is worth.
    ValueError: wrong number of placements, a shared parameter without a placement, or a limit that no layout keeps
    (the message has the least that one needs).
    """
    shared = _shared(graph, block, shared_parameters or {})
    for what, given, names in (("inputs", inputs, block.inputs), ("outputs", outputs, block.outputs)):
        if len(given) != len(names):
            raise ValueError(
                f"block {block.index} has {len(names)} {what} ({names}), {len(given)} placements were given"
            )
    model = block_model(graph, block, costs, [(p,) for p in inputs], [(p,) for p in outputs], shared)
    program = BlockProgram(model)
    try:
        selection = program.solve(memory_weight, memory_limit_bytes)
    except Infeasible:
        if memory_limit_bytes is None:
            raise ValueError(f"block {block.index}: every layout needs a conversion of infinite cost") from None
        least = least_memory(program)
        raise ValueError(
            f"block {block.index}: no layout on {degree} ranks fits in {memory_limit_bytes:.0f} bytes, the smallest "
            f"needs {least.memory_bytes:.0f}; raise the degree, the memory limit or the number of microbatches"
        ) from None
    return solution(graph, block, degree, costs, model, selection, memory_weight, tuple(shared))


def least_memory(program: BlockProgram, fixed: Mapping[int, int] | None = None) -> Selection:
    """The selection of fewest bytes."""
    return program.solve(memory_weight=1e4, fixed=fixed)


def _shared(graph: Graph, block: Block, given: Mapping[str, Placement]) -> dict[str, Placement]:
    missing = [name for name in block.parameters if name in graph.shared_parameters and name not in given]
    if missing:
        raise ValueError(
            f"block {block.index} shares parameters {missing} with other blocks; pass their placement at rest in "
            f"shared_parameters"
        )
    return {name: given[name] for name in block.parameters if name in given}


def solution(
    graph: Graph,
    block: Block,
    degree: int,
    costs: LayoutCosts,
    model: BlockModel,
    selection: Selection,
    memory_weight: float,
    shared_parameters: tuple[str, ...],
) -> BlockSolution:
    """`selection` as a layout, after holding it against `price_layout`."""
    layout = _layout(block, degree, model, selection)
    price = price_layout(graph, block, layout, costs, shared_parameters)
    for ours, theirs in ((selection.time_s, price.time_s), (selection.memory_bytes, price.memory_bytes)):
        assert abs(ours - theirs) <= 1e-9 * max(abs(ours), abs(theirs)), (
            f"block {block.index}: the solver counts {ours}, the returned layout costs {theirs}"
        )
    objective_s = price.time_s + memory_weight * price.memory_bytes
    bound_s = min(selection.lower_bound_s, objective_s)
    return BlockSolution(layout, price.time_s, price.memory_bytes, objective_s, bound_s, selection.relaxed)


def _layout(block: Block, degree: int, model: BlockModel, selection: Selection) -> Layout:
    def picked(role: str, name: str):
        index = model.index[role, name]
        return model.choices[index].options[selection.options[index]]

    return Layout(
        degree=degree,
        strategies=tuple(picked("op", name).key for name in block.ops),
        inputs=tuple(str(picked("input", name)) for name in block.inputs),
        outputs=tuple(str(picked("output", name)) for name in block.outputs),
        parameters=tuple(str(picked("parameter", name)) for name in block.parameters),
    )
