"""The layout solver against exhaustive enumeration, and on real models against hand-made layouts."""

from __future__ import annotations

import itertools
import random

import pytest
from layout_cases import PLACEMENTS, all_layouts, random_case, repeated_case

from autopar.planner import layout_chain, layout_elimination
from autopar.planner.layout_chain import chain_frontier, chain_layouts, chain_table
from autopar.planner.layout_options import layout_options
from autopar.planner.layout_price import price_layout
from autopar.planner.layouts import solve_block
from autopar.sharding.placement import REPLICATED, Split

CASES = 60


def _boundary(graph, block, seed):
    draw = random.Random(seed)
    inputs = tuple(draw.choice(PLACEMENTS) for _ in block.inputs)
    outputs = tuple(REPLICATED if name == graph.loss else draw.choice(PLACEMENTS) for name in block.outputs)
    shared = {name: draw.choice([REPLICATED, Split(0)]) for name in block.parameters if name in graph.shared_parameters}
    return inputs, outputs, shared


def _enumerate(graph, block, costs, boundary):
    layouts = all_layouts(graph, block, costs, *boundary)
    return [price_layout(graph, block, layout, costs, tuple(boundary[2])) for layout in layouts]


@pytest.mark.parametrize("integral", [False, True])  # integral prices make ties
@pytest.mark.parametrize("weight", [0.0, 1e-10, 1e-8])
def test_optimum_equals_enumeration(integral, weight):
    branched = 0
    for seed in range(CASES):
        graph, costs = random_case(seed, num_blocks=1 + seed % 2, integral=integral)
        block = graph.blocks[-1]
        boundary = _boundary(graph, block, seed)
        best = min(p.time_s + weight * p.memory_bytes for p in _enumerate(graph, block, costs, boundary))
        found = solve_block(graph, block, 2, costs, *boundary, memory_weight=weight)
        assert found.objective_s == pytest.approx(best, rel=1e-9, abs=1e-18), seed
        assert found.objective_s * (1 - 1e-9) <= found.lower_bound_s <= found.objective_s
        price = price_layout(graph, block, found.layout, costs, tuple(boundary[2]))
        assert price.time_s + weight * price.memory_bytes == pytest.approx(found.objective_s, rel=1e-12)
        branched += not found.relaxed
    print(f"weight {weight}: {branched} of {CASES} needed branching")


def test_limit_equals_enumeration():
    for seed in range(CASES):
        graph, costs = random_case(seed, num_blocks=1 + seed % 2)
        block = graph.blocks[-1]
        boundary = _boundary(graph, block, seed)
        prices = _enumerate(graph, block, costs, boundary)
        smallest, largest = min(p.memory_bytes for p in prices), max(p.memory_bytes for p in prices)
        for share in (0.0, 0.3, 0.7):
            limit = smallest + share * (largest - smallest)
            best = min(p.time_s for p in prices if p.memory_bytes <= limit * (1 + 1e-9))
            found = solve_block(graph, block, 2, costs, *boundary, memory_limit_bytes=limit)
            assert found.time_s == pytest.approx(best, rel=1e-9, abs=1e-18), (seed, share)
            assert found.memory_bytes <= limit * (1 + 1e-9)
        if smallest > 0:
            with pytest.raises(ValueError, match=f"smallest needs {smallest:.0f}"):
                solve_block(graph, block, 2, costs, *boundary, memory_limit_bytes=smallest * 0.99)


def test_forbidden_conversions_are_avoided():
    refused = 0
    for seed in range(CASES):
        graph, costs = random_case(seed, forbid=0.3)
        block = graph.blocks[-1]
        boundary = _boundary(graph, block, seed)
        best = min(p.time_s for p in _enumerate(graph, block, costs, boundary))
        if best == float("inf"):
            refused += 1
            with pytest.raises(ValueError, match="infinite"):
                solve_block(graph, block, 2, costs, *boundary)
        else:
            assert solve_block(graph, block, 2, costs, *boundary).time_s == pytest.approx(best, rel=1e-9)
    assert 0 < refused < CASES


def _best_of_block(graph, block, costs, boundary, weight, known):
    """The least objective of one block; equal blocks of a repeated case are enumerated once."""
    inputs, outputs, shared = boundary
    number = block.kind if costs.by_position else block.index
    key = (number, inputs, outputs, tuple(shared.items()), weight)
    if key not in known:
        prices = _enumerate(graph, block, costs, boundary)
        known[key] = min(p.time_s + weight * p.memory_bytes for p in prices)
    return known[key]


def _chain_by_enumeration(graph, costs, options, start, stop, entry, exit, weight):
    """Least objective over all boundary states, placements of shared parameters and layouts."""
    blocks = graph.blocks[start:stop]
    shared_names = [n for n in graph.shared_parameters if any(n in b.parameters for b in blocks)]
    best, known = float("inf"), {}
    for joint in itertools.product(*(options.candidates(n) for n in shared_names)):
        shared = dict(zip(shared_names, joint, strict=True))
        rest = sum(costs.rest_s(n, p) + weight * costs.rest_bytes(n, p) for n, p in shared.items())
        reach = {entry: rest} if entry is not None else {s: rest for s in options.states(start)}
        for block in blocks:
            after = options.states(block.index + 1) if block.index + 1 < stop or exit is None else (exit,)
            mine = {n: shared[n] for n in block.parameters if n in shared}
            reach = {
                q: min(
                    cost + _best_of_block(graph, block, costs, (before, q, mine), weight, known)
                    for before, cost in reach.items()
                )
                for q in after
            }
        best = min(best, *reach.values())
    return best


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_chain_equals_enumeration(weight):
    for seed in range(12):
        graph, costs = random_case(seed, num_ops=3, num_blocks=3)
        options = layout_options(graph, 2, costs)
        draw = random.Random(seed)
        for start, stop in ((0, 3), (0, 2), (1, 3)):
            entry = draw.choice([None, *options.states(start)])
            exit = draw.choice([None, *options.states(stop)])
            found = chain_layouts(options, start, stop, entry, exit, memory_weight=weight)
            best = _chain_by_enumeration(graph, costs, options, start, stop, entry, exit, weight)
            assert found.exact and found.objective_s == pytest.approx(best, rel=1e-9), (seed, start, stop)
            prices = [
                price_layout(graph, block, layout, costs, tuple(found.shared_parameters))
                for block, layout in zip(graph.blocks[start:stop], found.layouts, strict=True)
            ]
            rest = [(costs.rest_s(n, p), costs.rest_bytes(n, p)) for n, p in found.shared_parameters.items()]
            assert sum(p.time_s for p in prices) + sum(r[0] for r in rest) == pytest.approx(found.time_s, rel=1e-9)
            assert sum(p.memory_bytes for p in prices) + sum(r[1] for r in rest) == pytest.approx(found.memory_bytes)
            for left, right in itertools.pairwise(found.layouts):
                assert left.outputs == right.inputs


def test_frontier_is_the_lower_hull():
    for seed in range(8):
        graph, costs = random_case(seed, num_ops=3, num_blocks=2)
        options = layout_options(graph, 2, costs)
        frontier = chain_frontier(options, 0, 2, num_points=50)
        times, sizes = [s.time_s for s in frontier], [s.memory_bytes for s in frontier]
        assert times == sorted(times) and sizes == sorted(sizes, reverse=True)
        for weight in (0.0, *(10**e for e in range(-12, -8))):
            best = _chain_by_enumeration(graph, costs, options, 0, 2, None, None, weight)
            assert min(t + weight * m for t, m in zip(times, sizes, strict=True)) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_equal_blocks_are_solved_once(seed):
    solved = []
    for num_blocks in (4, 12):
        graph, costs = repeated_case(seed, num_blocks)
        options = layout_options(graph, 2, costs)
        found = chain_layouts(options, 0, num_blocks)
        assert len(found.layouts) == num_blocks
        solved.append(options.num_solved)
        best = _chain_by_enumeration(graph, costs, options, 0, num_blocks, None, None, 0.0)
        assert found.time_s == pytest.approx(best, rel=1e-9)
        prices = [price_layout(graph, b, y, costs) for b, y in zip(graph.blocks, found.layouts, strict=True)]
        assert sum(p.time_s for p in prices) == pytest.approx(found.time_s, rel=1e-9)
    entries = len(options.states(1)) ** 2  # of the one kind in the middle; the ends have one row or column each
    assert solved[1] <= solved[0] + entries


def test_many_shared_parameters_are_improved_one_at_a_time(monkeypatch):
    """Beyond the enumeration limit the answer is a local optimum that says so, never worse than all replicated."""
    found_exact = 0
    for seed in range(8):
        graph, costs = random_case(seed, num_ops=4, num_blocks=2)
        options = layout_options(graph, 2, costs)
        exact = chain_layouts(options, 0, 2)
        replicated = chain_layouts(options, 0, 2, shared_parameters=dict.fromkeys(graph.shared_parameters, REPLICATED))
        with monkeypatch.context() as patch:
            patch.setattr(layout_chain, "MAX_SHARED", 0)
            local = chain_layouts(options, 0, 2)
        assert exact.exact and not local.exact
        assert exact.objective_s * (1 - 1e-9) <= local.objective_s <= replicated.objective_s * (1 + 1e-9)
        found_exact += local.objective_s <= exact.objective_s * (1 + 1e-9)
    assert found_exact > 0


def test_states_and_ranges_are_checked():
    graph, costs = random_case(1, num_blocks=2)
    options = layout_options(graph, 2, costs)
    with pytest.raises(ValueError, match=r"blocks \[1, 1\)"):
        chain_layouts(options, 1, 1)
    with pytest.raises(ValueError, match="cannot be in state"):
        chain_layouts(options, 0, 1, exit=(Split(5),))
    block = next(b for b in graph.blocks if set(b.parameters) & set(graph.shared_parameters))
    inputs, outputs, shared = _boundary(graph, block, 0)
    with pytest.raises(ValueError, match="shares parameters"):
        solve_block(graph, block, 2, costs, inputs, outputs)
    with pytest.raises(ValueError, match="placements were given"):
        solve_block(graph, block, 2, costs, inputs, (*outputs, REPLICATED), shared)


def test_table_agrees_with_single_chains():
    graph, costs = random_case(4, num_ops=3, num_blocks=3)
    options = layout_options(graph, 2, costs)
    table = chain_table(options, 0, 2)
    assert {exit for _, exit in table} == set(options.states(2))
    for (entry, exit), solution in table.items():
        assert solution.boundaries[0] == entry and solution.boundaries[-1] == exit
        assert solution.objective_s == chain_layouts(options, 0, 2, entry, exit).objective_s
    assert min(s.objective_s for s in table.values()) == chain_layouts(options, 0, 2).objective_s


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_elimination_equals_programs(monkeypatch, weight):
    """Blocks too wide for tables are solved as programs, pair by pair of states: the answers are the same."""
    for seed in range(10):
        graph, costs = random_case(seed, num_ops=5, num_blocks=3, forbid=0.1)
        tables = layout_options(graph, 2, costs)
        with monkeypatch.context() as patch:
            patch.setattr(layout_elimination, "MAX_TABLE", 0)
            programs = layout_options(graph, 2, costs)
            found = []
            for options in (tables, programs):
                try:
                    found.append(chain_layouts(options, 0, 3, memory_weight=weight).objective_s)
                except ValueError:
                    found.append(float("inf"))
        assert found[0] == pytest.approx(found[1], rel=1e-6), seed
        shared = dict.fromkeys(graph.shared_parameters, REPLICATED)
        assert programs.table(0, shared, weight) is None
