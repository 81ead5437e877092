"""What constraints pin, against filters over the whole space; and which of them contradict, by brute force."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from method_cases import captured_problem, small_problem
from planner_cases import chain_graph, small_cluster

from autopar.plan import Plan
from autopar.planner.chains import LayoutChains
from autopar.planner.conflicts import contradiction, items, only
from autopar.planner.constraints import Constraints
from autopar.planner.methods.exhaustive import the_space
from autopar.planner.pins import Pins
from autopar.planner.problem import Problem
from autopar.planner.search import METHODS, search
from autopar.sharding.flow import find_strategies
from autopar.sharding.placement import PARTIAL, Split
from autopar.sharding.rows import stage_units
from autopar.simulate import simulate


def pinned_problem(problem: Problem, **pins) -> Problem:
    return replace(problem, constraints=Constraints(**pins))


# -- contradictions


@pytest.mark.parametrize("seed", range(40))
def test_the_contradicting_set_is_smallest(seed):
    """Whether any shape of the free problem has all pinned values, with and without each of the named ones."""
    draw = random.Random(seed)
    problem = small_problem(seed, draw.choice([6, 8, 12]), num_blocks=5, batch_size=draw.choice([6, 8, 12]))
    values = {
        "data": [1, 2, 3, 4, 6], "tensor": [1, 2, 3, 4], "pipeline": [1, 2, 3, 4], "microbatches": [1, 2, 3, 4, 6],
        "schedule": ["1f1b", "gpipe"], "zero": [0, 3],
    }  # fmt: skip
    pins = {name: draw.choice(values[name]) for name in draw.sample(list(values), draw.randrange(2, 6))}

    def possible(constraints: Constraints) -> bool:
        wanted = dict(items(constraints))
        # one stage or one microbatch: GPipe is 1F1B, and is made where it is asked for
        return any(
            all(getattr(shape, name) == value or name == "schedule" for name, value in wanted.items())
            for shape in problem.shapes
        )

    constraints = Constraints(**pins)
    if possible(constraints):
        assert pinned_problem(problem, **pins).shapes
        return
    clash = contradiction(constraints, possible)
    assert not possible(only(constraints, list(clash)))
    for item in clash:
        assert possible(only(constraints, [other for other in clash if other != item]))
    with pytest.raises(ValueError) as caught:
        assert pinned_problem(problem, **pins).shapes
    # of several contradictions one is told
    said = str(caught.value)
    if "contradict each other" in said:
        named = said.partition("contradict each other")[0].rpartition(": ")[2]
        told = {pair.partition("=")[0] for pair in named.replace(" and ", " ").split()}
        assert not possible(Constraints(**{name: pins[name] for name in told}))


def test_a_way_out_is_one():
    graph, cluster = chain_graph((0, 1, 1, 2), 8), small_cluster(8)
    with pytest.raises(ValueError) as caught:
        search(graph, cluster, tensor=4, pipeline=2, zero=3)
    assert "tensor could be 1 or 2" in str(caught.value)
    for tensor in (1, 2):
        assert pinned_problem(small_problem(0, 8, num_blocks=4), tensor=tensor, pipeline=2, zero=3).shapes


# -- stages


def keeps_stages(plan: Plan, pins: dict[int, int]) -> bool:
    """pins: by block."""
    place = {block: s for s, stage in enumerate(plan.stages) for block in range(stage.start, stage.stop)}
    return all(place[block] == number % len(plan.stages) for block, number in pins.items())


STAGES = [{1: 0}, {3: 1}, {0: 0, 2: 1}, {4: -1}, {1: 0, 2: 1, 4: 3}, {2: -1, 1: 0}]


@pytest.mark.parametrize("pins", STAGES, ids=str)
def test_pinned_stages_are_the_best_of_those_that_keep_them(pins):
    for seed in range(2):
        problem = small_problem(seed, 4, num_blocks=5, batch_size=4, microbatches=2, zero=0, schedule="1f1b")
        named = {f"layers.{block}": number for block, number in pins.items()}
        best_s = min(
            simulate(problem.graph, plan, problem.cluster, model=problem.costs).step_time_s
            for plan in the_space(problem)[1]
            if plan.pipeline > max(pins.values()) and keeps_stages(plan, pins)
        )
        for method in ("auto", "exhaustive"):
            plan = METHODS[method](pinned_problem(problem, stage=named, microbatches=2, zero=0, schedule="1f1b"))
            assert keeps_stages(plan, pins)
            # auto's space is larger
            assert plan.prediction.step_time_s <= best_s * (1 + 1e-8), (method, seed)
            assert method == "auto" or plan.prediction.step_time_s == pytest.approx(best_s, rel=1e-8)


@pytest.mark.parametrize("method", ["pipedream", "dapple", "piper", "alpa", "aceso", "metis", "uniap"])
def test_methods_keep_stages_or_say_that_they_find_none(method):
    found = 0
    for seed in range(4):
        problem = small_problem(seed, 4, num_blocks=5, batch_size=4)
        try:
            plan = METHODS[method](pinned_problem(problem, stage={"layers.1": 0, "layers.4": -1}))
        except ValueError as error:
            assert "is not what stage= says; use method='auto'" in str(error)
        else:
            found += 1
            assert keeps_stages(plan, {1: 0, 4: -1})
    assert found


def test_which_numbers_of_stages_are_possible():
    """Against all ways to cut."""
    graph = chain_graph((0, 1, 1, 1, 2), 4)
    draw = random.Random(1)
    for _ in range(60):
        pins = {b: draw.randrange(-3, 4) for b in draw.sample(range(5), draw.randrange(1, 4))}
        resolved = Pins.of(graph, (), tuple((f"layers.{b}", n) for b, n in pins.items()))
        for num_stages in range(1, 6):
            starts = [()]
            for _ in range(num_stages - 1):
                starts = [(*s, cut) for s in starts for cut in range((s[-1] if s else 0) + 1, 5)]
            ways = [
                all(
                    -num_stages <= n < num_stages and n % num_stages == sum(cut <= b for cut in cuts)
                    for b, n in pins.items()
                )
                for cuts in starts
            ]
            assert resolved.stages_possible(num_stages) == any(ways), (pins, num_stages)


# -- layouts

LAYOUTS = {
    "column": {"*.q_proj": "column"},
    "row": {"*.o_proj.weight": "row"},
    "both": {"*mlp.up_proj": "column", "*mlp.down_proj": "row"},
    "replicated": {"*.mlp.*": "replicated"},
    "odd": {"*.k_proj": "row"},
    "one layer": {"*layers.0.*down_proj": "column"},
    "vocabulary": {"*embed_tokens": "vocabulary"},
    "heads": {"*attn": "heads"},
    "sequence": {"*up_proj": "sequence"},
}


def test_layouts_are_kept():
    """The placements that the plan's layouts give the pinned ops, read off without the code that pins."""
    import fnmatch

    for method in ("auto", "exhaustive", "alpa", "tofu", "flexflow", "whale"):
        for case, layout in LAYOUTS.items():
            if method != "auto" and case not in ("column", "one layer"):
                continue
            base = captured_problem("llama", 2)
            problem = Problem(
                base.graph, base.cluster, base.costs, LayoutChains(),
                Constraints(tensor=2, microbatches=1, layout=layout),
            )  # fmt: skip
            try:
                plan = METHODS[method](problem)
            except ValueError as error:
                assert method in ("flexflow", "whale", "tofu"), (method, case, error)
                continue
            plan.validate(base.graph, base.cluster)
            (stage,) = plan.stages
            kept = 0
            for block, (one,) in zip(base.graph.blocks, plan.layouts_of(stage), strict=True):
                for op, key in zip(base.graph.block_ops(block), one.strategies, strict=True):
                    (strategy,) = find_strategies(base.graph, op, (key,), (2,), stage_units(plan, stage))
                    for pattern, word in layout.items():
                        names = [op.module, *(base.graph.tensors[name].fqn for name in op.inputs)]
                        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                            kept += looks_like(word, base.graph, op, strategy)
            assert kept >= len(layout), (method, case)


def looks_like(word: str, graph, op, strategy) -> bool:
    """One op that is told to be `word` is; AssertionError if not; False for ops that the word is not about."""
    weights = [
        place
        for name, place in zip(op.inputs, strategy.inputs, strict=True)
        if graph.tensors[name].role == "parameter" and graph.tensors[name].shape[1:]
    ]
    is_attention = "scaled_dot_product" in op.target
    out = strategy.outputs[0]
    if word == "replicated":
        assert strategy.work == 1 and strategy.key == "-", (op, strategy)
        return True
    if word == "heads":
        assert not is_attention or out == Split(1)
        return is_attention
    if not weights:
        return False
    assert {
        "column": weights[0] == Split(0) and isinstance(out, Split) and out.dim == 2,
        "row": weights[0] == Split(1) and out == PARTIAL,
        "vocabulary": weights[0] == Split(0) and out == PARTIAL,
        "sequence": not isinstance(weights[0], Split) and out == Split(1),
    }[word], (word, op, strategy)
    return True


def test_a_layout_needs_an_axis():
    base = captured_problem("llama", 2)
    with pytest.raises(ValueError, match=r"tensor=1 and layout\['\*.q_proj'\]='column' contradict each other"):
        search(base.graph, base.cluster, tensor=1, layout={"*.q_proj": "column"})
    plan = search(base.graph, base.cluster, layout={"*.q_proj": "column"}, progress=False)
    assert plan.stages[0].tensor == 2
    with pytest.raises(ValueError, match=r"up_proj'\]='row' and layout\['\*.mlp.\*up\*'\]='column' contradict"):
        search(base.graph, base.cluster, layout={"*.mlp.up_proj": "row", "*.mlp.*up*": "column"})


# -- the rest


@pytest.mark.parametrize("method", ["auto", "exhaustive", "alpa", "aceso", "piper", "metis", "uniap"])
@pytest.mark.parametrize("pins", [{"zero": 1}, {"zero": 2}, {"recompute": "selective"}], ids=str)
def test_levels_that_are_not_searched_can_be_pinned(method, pins):
    problem = captured_problem("mlp", 2) if method in ("auto", "exhaustive") else small_problem(2, 4)
    plan = METHODS[method](pinned_problem(problem, data=2, **pins))
    plan.validate(problem.graph, problem.cluster)
    for stage in plan.stages:
        if "zero" in pins:
            assert stage.zero == pins["zero"]
        else:
            assert set(stage.block_recompute) == {"selective"}


@pytest.mark.parametrize("method, schedule", [
    ("exhaustive", "zb-h1"), ("alpa", "zb-h1"), ("piper", "zb-h1"), ("dapple", "zb-h1"), ("metis", "zb-h1"),
    ("uniap", "zb-h1"), ("pipedream", "2bw"), ("exhaustive", "pipedream"), ("exhaustive", "2bw"),
])  # fmt: skip
def test_schedules_of_some_methods(method, schedule):
    base = small_problem(3, 4, num_blocks=4, batch_size=4)
    plan = METHODS[method](pinned_problem(base, schedule=schedule, pipeline=2))
    assert plan.schedule == schedule and plan.pipeline == 2
    plan.validate(base.graph, base.cluster)


def test_memory_may_be_limited_or_reserved():
    base = small_problem(0, 2)
    assert pinned_problem(base, memory_reserve=0.25).memory_limit_bytes == 75 * 10**10
    assert pinned_problem(base, memory_reserve=10**11).memory_limit_bytes == 9 * 10**11
    assert pinned_problem(base, memory_reserve=0).memory_limit_bytes == 10**12
    assert pinned_problem(base, memory_limit_bytes=5).memory_limit_bytes == 5
    assert base.memory_limit_bytes == 9 * 10**11
