"""The layout solver on Llama and GPT-2: never worse than Megatron's layouts made by hand, and those where best."""

from __future__ import annotations

import statistics
import time

import pytest
from layout_models import GivenCosts, gpt2, llama, megatron
from models import ZOO

from autopar.capture.export import capture
from autopar.plan import Layout
from autopar.planner.layout_chain import chain_frontier, chain_layouts
from autopar.planner.layout_options import layout_options
from autopar.planner.layout_price import price_layout
from autopar.planner.layouts import solve_block
from autopar.report.naming import describe_layout, describe_layouts
from autopar.sharding.flow import Convert, block_flow
from autopar.sharding.placement import REPLICATED, Split

MODELS = {
    "tiny Llama": lambda: llama(),
    "tiny tied Llama": lambda: llama(tied=True),
    "tiny GPT-2": lambda: gpt2(),
    "Llama": lambda: llama(hidden=4096, layers=6, mlp=11008, heads=32, key_heads=8, vocabulary=32000, length=2048),
    "GPT-2": lambda: gpt2(hidden=1024, layers=4, heads=16, vocabulary=50304, length=1024),
}

# Compute is what takes time, elementwise work is nearly free, an all-reduce is faster than a gather (as by reduction in
# the network), and the optimizer makes replicated parameters dear.
FAVOURS_MEGATRON = {
    "flops_per_s": 1e12, "bytes_per_s": 1e16, "latency_s": 1e-7, "bandwidth_bytes_per_s": 1e12,
    "all_reduce": 0.2, "all_to_all": 32.0, "microbatches": 1, "rest_s_per_byte": 1e-12,
}  # fmt: skip
# Elementwise work costs time, reduce-scatters are cheap, every message costs latency, and memory is priced.
FAVOURS_SEQUENCE = {
    "flops_per_s": 1e12, "bytes_per_s": 1e13, "latency_s": 1e-5, "bandwidth_bytes_per_s": 1e12,
    "reduce_scatter": 0.5, "all_to_all": 32.0, "microbatches": 1024,
}  # fmt: skip


def _total(graph, layouts, costs, shared, weight=0.0):
    """Objective of layouts of all blocks, by the independent pricing."""
    prices = [price_layout(graph, b, y, costs, tuple(shared)) for b, y in zip(graph.blocks, layouts, strict=True)]
    rest = [(costs.rest_s(n, p), costs.rest_bytes(n, p)) for n, p in shared.items()]
    time_s = sum(p.time_s for p in prices) + sum(r[0] for r in rest)
    return time_s + weight * (sum(p.memory_bytes for p in prices) + sum(r[1] for r in rest))


@pytest.mark.parametrize("name", MODELS)
def test_never_worse_than_megatron(name):
    graph = MODELS[name]()
    shared = {parameter: Split(0) for parameter in graph.shared_parameters}
    gains = []
    for degree in (2, 4) if name in ("tiny Llama", "tiny tied Llama") else (2, 8):
        for shards, prices in ((1, {}), (8, {}), (8, FAVOURS_MEGATRON), (8, FAVOURS_SEQUENCE)):
            costs = GivenCosts(graph, degree, shards=shards, **prices)
            options = layout_options(graph, degree, costs)
            hands = [megatron(graph, degree, costs, sequence) for sequence in (False, True)]
            for weight in (0.0, 1e-11):
                best = chain_layouts(options, 0, len(graph.blocks), memory_weight=weight)
                priced = _total(graph, best.layouts, costs, best.shared_parameters, weight)
                assert priced == pytest.approx(best.objective_s, rel=1e-9)
                for hand in hands:
                    hand_s = _total(graph, hand, costs, shared, weight)
                    assert best.objective_s <= hand_s * (1 + 1e-9), (degree, shards, weight)
                    gains.append(hand_s / best.objective_s)
    print(f"{name}: hand-made layouts take {min(gains):.3f} to {max(gains):.2f} times the optimum ({len(gains)} cases)")


def _decided(graph, layouts):
    """The strategies of all products, attention, the token embedding, the loss and the norms."""
    kinds = ("linear", "addmm", "scaled_dot_product_attention", "embedding", "cross_entropy_sum", "layer_norm", "pow")
    return {
        name: key
        for block, layout in zip(graph.blocks, layouts, strict=True)
        for name, key in zip(block.ops, layout.strategies, strict=True)
        if graph.op[name].target.split(".")[1] in kinds and not _is_position_embedding(graph, name)
    }


def _is_position_embedding(graph, name):
    """GPT-2's table of positions is small and read once per step: how it is cut is a matter of noise."""
    op = graph.op[name]
    return op.target.startswith("aten.embedding.") and graph.tensors[op.inputs[1]].role != "input"


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_megatron_where_it_is_best(name, degree):
    graph = MODELS[name]()
    costs = GivenCosts(graph, degree, shards=8, **FAVOURS_MEGATRON)
    shared = {parameter: Split(0) for parameter in graph.shared_parameters}
    best = chain_layouts(layout_options(graph, degree, costs), 0, len(graph.blocks))
    hand = megatron(graph, degree, costs, sequence=False)
    assert _decided(graph, best.layouts) == _decided(graph, hand)
    assert best.shared_parameters == shared
    assert best.objective_s == pytest.approx(_total(graph, hand, costs, shared), rel=1e-3)
    if name == "Llama":
        assert best.layouts == hand
    assert describe_layouts(graph, graph.blocks, best.layouts, 8) == (
        f"tensor {degree}: column/row parallel attention and MLP (Megatron), vocabulary-parallel embedding/loss"
    )


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("name, faster, weight", [("Llama", 1.0, 1e-12), ("GPT-2", 0.1, 1e-11)])
def test_sequence_split_where_it_is_best(name, faster, weight, degree):
    graph = MODELS[name]()
    prices = FAVOURS_SEQUENCE | {"bytes_per_s": faster * FAVOURS_SEQUENCE["bytes_per_s"]}
    costs = GivenCosts(graph, degree, shards=8, **prices)
    shared = {parameter: Split(0) for parameter in graph.shared_parameters}
    best = chain_layouts(layout_options(graph, degree, costs), 0, len(graph.blocks), memory_weight=weight)
    hand = megatron(graph, degree, costs, sequence=True)
    assert _decided(graph, best.layouts) == _decided(graph, hand)
    assert best.shared_parameters == shared
    assert best.objective_s == pytest.approx(_total(graph, hand, costs, shared, weight), rel=1e-3)
    if name == "Llama":
        assert best.layouts == hand
    assert describe_layouts(graph, graph.blocks, best.layouts, 8) == (
        f"tensor {degree}: column/row parallel attention and MLP (Megatron), sequence split, "
        "vocabulary-parallel embedding/loss"
    )


@pytest.mark.parametrize("name", ["tiny Llama", "tiny GPT-2"])
def test_flow_does_what_was_priced(name):
    """The steps that the runtime executes convert exactly what the solver paid for."""
    graph = MODELS[name]()
    for shards in (1, 8):
        costs = GivenCosts(graph, 2, shards=shards)
        for weight in (0.0, 1e-10):
            best = chain_layouts(layout_options(graph, 2, costs), 0, len(graph.blocks), memory_weight=weight)
            for block, layout in zip(graph.blocks, best.layouts, strict=True):
                steps = block_flow(graph, block, (layout,), shards)
                done = {(s.tensor, s.have, s.want) for s in steps if isinstance(s, Convert)}
                assert done == {c[:3] for c in price_layout(graph, block, layout, costs).conversions}


def test_gradients_of_query_key_value_are_reduced_once():
    graph = MODELS["Llama"]()
    costs = GivenCosts(graph, 4, shards=8, **FAVOURS_MEGATRON)
    block = graph.blocks[2]
    found = solve_block(graph, block, 4, costs, [REPLICATED], [REPLICATED])
    conversions = price_layout(graph, block, found.layout, costs).conversions
    assert sorted((str(have), str(want)) for _, have, want, seconds in conversions if seconds) == [
        ("P", "R"), ("P", "R"), ("R", "H"), ("R", "H"),
    ]  # fmt: skip


def test_frontier_trades_time_for_memory():
    graph = MODELS["Llama"]()
    options = layout_options(graph, 4, GivenCosts(graph, 4, shards=8, microbatches=64))
    frontier = chain_frontier(options, 0, len(graph.blocks))
    assert len(frontier) > 2
    for left, right in zip(frontier, frontier[1:], strict=False):
        assert left.time_s < right.time_s and left.memory_bytes > right.memory_bytes


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_solve_time(name):
    graph = MODELS[name]()
    seconds = []
    for degree in (2, 4, 8):
        for index in (2, 3):
            for prices in ({}, FAVOURS_MEGATRON, FAVOURS_SEQUENCE):
                costs = GivenCosts(graph, degree, shards=8, **prices)
                start = time.perf_counter()
                solve_block(graph, graph.blocks[index], degree, costs, [REPLICATED], [REPLICATED])
                seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"{name} layer: median {median:.3f} s, largest {max(seconds):.3f} s over {len(seconds)} solves")
    assert median < 1.5  # 0.1 s is the aim; the rest is for a busy machine


def test_names_of_other_layouts():
    """Prices of extreme clusters, and what the layouts that they favour are called."""
    graph = llama(key_heads=8)
    cases = {
        # Messages are free, and each row of the batch has its rank.
        "batch-split": GivenCosts(graph, 2, flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-12),
        # The batch cannot be split any more, an all-to-all is nearly free, and parameters cost nothing.
        "all-to-all, Ulysses": GivenCosts(
            graph, 2, flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-7, bandwidth_bytes_per_s=1e9, all_to_all=1e-3,
            microbatches=10**6, shards=8,
        ),
        "everything replicated": GivenCosts(graph, 2, latency_s=10.0),
    }  # fmt: skip
    for words, costs in cases.items():
        best = chain_layouts(layout_options(graph, 2, costs), 0, len(graph.blocks))
        assert words in describe_layouts(graph, graph.blocks, best.layouts, costs.shards)
        assert words in describe_layout(graph, graph.blocks[2], best.layouts[2], costs.shards)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_has_layouts(name):
    """On any module: an optimum that is what the pricing says, and never worse than everything replicated."""
    module, example, loss = ZOO[name]()
    graph = capture(module, example, loss)
    shared = dict.fromkeys(graph.shared_parameters, REPLICATED)
    for degree, shards in ((2, 1), (4, 2)):
        costs = GivenCosts(graph, degree, shards=shards, flops_per_s=1e7, bytes_per_s=1e8, latency_s=1e-7)
        for weight in (0.0, 1e-8):
            best = chain_layouts(layout_options(graph, degree, costs), 0, len(graph.blocks), memory_weight=weight)
            priced = _total(graph, best.layouts, costs, best.shared_parameters, weight)
            assert priced == pytest.approx(best.objective_s, rel=1e-9)
            assert best.objective_s <= _total(graph, _replicated(graph, degree), costs, shared, weight) * (1 + 1e-9)
            assert describe_layouts(graph, graph.blocks, best.layouts, shards).startswith(f"tensor {degree}: ")


def _replicated(graph, degree):
    return [
        Layout(degree, *(tuple(token for _ in names) for token, names in zip("-RRR", fields, strict=True)))
        for fields in ((b.ops, b.inputs, b.outputs, b.parameters) for b in graph.blocks)
    ]
