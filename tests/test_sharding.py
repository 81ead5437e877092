"""Notation, views, placements and strategies: generated cases against brute force, and errors."""

from __future__ import annotations

import itertools
import math
import random

import einops
import models
import pytest
import torch
from opinfo_cases import check_sample, check_strategy, one_op_graph

from autopar.capture.export import capture
from autopar.sharding.analysis import analysis
from autopar.sharding.emulate import combine, convert, dual, hand_out
from autopar.sharding.local import local_blocks, local_shape
from autopar.sharding.notation import bind, parse
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Placement, Split, conversion
from autopar.sharding.rule import divides, name_of, split_of
from autopar.sharding.rules import DEFAULT
from autopar.sharding.strategies import rule, strategies, unknown_ops, use_rules


@pytest.mark.parametrize(
    ("pattern", "complaint"),
    [
        ("a b, b c", "no '->'"),
        ("a (b c -> a b c", "never closed"),
        ("a b) -> a b", r"'\)' without"),
        ("a ((b) c) -> a", "inside parentheses"),
        ("a a -> a", "twice"),
        ("... a ... -> a", "twice"),
        ("... a -> a", "no output"),
        ("a? -> a", "cannot read"),
    ],
)
def test_a_pattern_that_does_not_parse_is_shown(pattern, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        parse(pattern)
    assert repr(pattern) in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "inputs", "outputs", "complaint"),
    [
        ("a b -> a b", [(2, 3, 4)], [(2, 3)], "2 dims are named"),
        ("a b, b -> a", [(2, 3), (4,)], [(2,)], "b is both 3 and 4"),
        ("(a b) -> a b", [(7,)], [(2, 3)], "has size 7"),
        ("(a b) -> (a b)", [(6,)], [(6,)], "no known sizes"),
        ("a 1 -> a", [(2, 3)], [(2,)], "written 1 has size 3"),
        ("a -> a", [(2,), (3,)], [(2,)], "names 1 inputs"),
        ("... a -> ... a", [()], [()], "too few dims"),
    ],
)
def test_a_pattern_that_does_not_fit_is_shown_with_the_shapes(pattern, inputs, outputs, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        bind(parse(pattern), inputs, outputs)
    assert repr(pattern) in str(error.value) and str(inputs[0]) in str(error.value)


def test_ellipses_broadcast_from_the_right():
    bound = bind(parse("... i, o i, o -> ... o"), [(4, 1, 8), (6, 8)], [(4, 1, 6)])
    assert bound.inputs == ((("d0",), ("d1",), ("i",)), (("o",), ("i",)))
    bound = bind(parse("... a, ... a -> ... a"), [(4, 1, 8), (3, 8)], [(4, 3, 8)])
    assert bound.inputs == ((("d0",), (), ("a",)), (("d1",), ("a",)))
    assert bound.outputs == ((("d0",), ("d1",), ("a",)),)


def _random_grouping(draw: random.Random, count: int) -> list[list[int]]:
    groups: list[list[int]] = [[0]]
    for i in range(1, count):
        if draw.random() < 0.5:
            groups.append([i])
        else:
            groups[-1].append(i)
    return groups


def test_views_against_einops_on_random_factorizations():
    """Factors that einops can name on both sides of a view, and where a dim begins, can be split; and rightly."""
    draw = random.Random(0)
    checked = 0
    for _ in range(250):
        sizes = [draw.choice((2, 3, 4, 6)) for _ in range(draw.randint(2, 5))]
        if math.prod(sizes) > 3000:
            continue
        sides = [_random_grouping(draw, len(sizes)) for _ in range(2)]
        shapes = [tuple(math.prod(sizes[i] for i in group) for group in side) for side in sides]
        names = [f"f{i}" for i in range(len(sizes))]
        text = " -> ".join(" ".join("(" + " ".join(names[i] for i in g) + ")" for g in side) for side in sides)
        x = torch.arange(math.prod(sizes), dtype=torch.float64).reshape(shapes[0]).requires_grad_()
        expected = einops.rearrange(x, text, **dict(zip(names, sizes, strict=True)))
        assert torch.equal(expected, x.reshape(shapes[1]))
        sample = ("aten.reshape.default", (x, shapes[1]), {})
        count, wrong = check_sample(sample)
        assert not wrong, wrong
        graph, _ = one_op_graph(*sample)
        for degree in (2, 3):
            found = {(s.inputs[0], s.outputs[0]) for s in strategies(graph, graph.ops[0], degree)}
            for factor, size in enumerate(sizes):
                cuts = [_cut_of(side, sizes, factor) for side in sides]
                # A split at the start of a factor can be told apart from others only where a dim begins there.
                if size % degree == 0 and any(cut.blocks == 1 for cut in cuts):
                    assert tuple(cuts) in found, (text, sizes, names[factor], degree)
                    checked += 1
    assert checked > 500


def _cut_of(side: list[list[int]], sizes: list[int], factor: int) -> Split:
    dim = next(i for i, group in enumerate(side) if factor in group)
    return Split(dim, math.prod(sizes[i] for i in side[dim] if i < factor))


MODELS = ("build_llama", "build_gpt2", "build_conv_net", "build_tied_lm", "build_mlp", "build_two_inputs")


@pytest.fixture(scope="module")
def graphs():
    return [capture(*getattr(models, name)()) for name in MODELS]


def test_names_and_splits_are_inverse(graphs):
    for graph in graphs:
        for op in graph.ops:
            op_rule = rule(graph, op)
            for index, name in itertools.product(range(len(op_rule.tensors)), op_rule.splits):
                for outer in (1, 2, 3, 4, 8):
                    if not any(name in dim for dim in op_rule.tensors[index][0]) or op_rule.sizes[name] <= outer:
                        continue
                    split = split_of(op_rule, index, name, outer) if op_rule.sizes[name] % outer == 0 else None
                    if split:
                        assert name_of(op_rule, index, split) == (name, outer)


def test_strategies_are_coherent(graphs):
    """Keys are unique, few, "-" first; what carries no gradient is never SHARED; every split divides."""
    for graph in graphs:
        for degree, shards in ((2, 1), (4, 1), (2, 4)):
            for op in graph.ops:
                found = strategies(graph, op, degree, shards)
                assert found[0].key == "-" and len({s.key for s in found}) == len(found) <= 9
                if op.name in graph.side_ops:
                    assert len(found) == 1
                for s in found:
                    assert len(s.inputs) == len(op.inputs) and len(s.outputs) == len(op.outputs)
                    assert 0 < s.work <= 1 and (s.work < 1) <= (s.key not in ("-", "shared"))
                    for name, placement in zip((*op.inputs, *op.outputs), (*s.inputs, *s.outputs), strict=True):
                        tensor = graph.tensors[name]
                        assert placement != SHARED or tensor.requires_grad
                        assert divides(tensor.shape, [(placement, degree)])


def test_isomorphic_blocks_share_their_strategies(graphs):
    for graph in graphs:
        for one, other in itertools.combinations(graph.blocks, 2):
            if one.kind == other.kind:
                for a, b in zip(graph.block_ops(one), graph.block_ops(other), strict=True):
                    assert strategies(graph, a, 2) is strategies(graph, b, 2)


def test_every_op_of_the_models_has_a_rule(graphs):
    assert [unknown_ops(graph) for graph in graphs] == [()] * len(graphs)


def test_the_named_schemes_are_found():
    """Megatron's column and row splits, its vocabulary splits, heads, and sequence splits through flattened matmuls."""
    graph = capture(*models.build_gpt2())
    keys = {}
    for op in graph.ops:
        keys.setdefault(op.target.split(".")[1], set()).update(s.key for s in strategies(graph, op, 2, 2))
    rows = graph.batch_size
    assert {"n", "n@3", "k", "m", f"m@{rows}"} <= keys["addmm"]
    assert {"d0", "d1", "q"} <= keys["scaled_dot_product_attention"]
    assert "v" in keys["embedding"] and "v" in keys["cross_entropy_sum"]
    assert "partial" in keys["add"]


PLACEMENTS = (Split(0), Split(1), Split(0, 2), Split(1, 2), REPLICATED, PARTIAL, SHARED)


@pytest.mark.parametrize("degree", (2, 3))
def test_conversions_do_what_they_say(degree):
    """The action that `conversion` names turns values, and gradients back, as the whole tensor demands."""
    torch.manual_seed(degree)
    for have, want in itertools.product(PLACEMENTS, PLACEMENTS):
        values = [v.clone().requires_grad_() for v in _random_values(have, degree)]
        converted = convert(values, (have,), (want,), (degree,))
        said = conversion(have, want)
        _assert_equal(converted, _act(said.forward, values, have, want, degree), want)
        seeds = _random_values(dual(want), degree)
        torch.autograd.backward(converted, seeds)
        gradients = _act(said.backward, seeds, dual(want), dual(have), degree)
        _assert_equal([v.grad for v in values], gradients, dual(have))


def _random_values(placement: Placement, degree: int) -> list[torch.Tensor]:
    if placement == PARTIAL:
        return [torch.randn(12, 24, dtype=torch.float64) for _ in range(degree)]
    return [v.clone() for v in hand_out(torch.randn(12, 24, dtype=torch.float64), placement, degree)]


def _act(action: str, values: list[torch.Tensor], have: Placement, want: Placement, degree: int) -> list[torch.Tensor]:
    """The collectives, written down again from their definitions."""
    values = [v.detach() for v in values]

    def place(whole: torch.Tensor, rank: int, split: Placement) -> torch.Tensor:
        index = hand_out(torch.arange(whole.shape[split.dim]), Split(0, split.blocks), degree)[rank]
        return whole.index_select(split.dim, index)

    def padded(value: torch.Tensor, rank: int, split: Placement) -> torch.Tensor:
        index = hand_out(torch.arange(value.shape[split.dim] * degree), Split(0, split.blocks), degree)[rank]
        shape = list(value.shape)
        shape[split.dim] *= degree
        return torch.zeros(shape, dtype=value.dtype).index_copy(split.dim, index, value)

    ranks = range(degree)
    match action:
        case "":
            return values
        case "all_reduce":
            return [sum(values)] * degree
        case "mask":
            return [v if r == 0 else torch.zeros_like(v) for r, v in enumerate(values)]
        case "slice":
            return [place(values[r], r, want) for r in ranks]
        case "pad":
            return [padded(values[r], r, have) for r in ranks]
        case "all_gather":
            return [sum(padded(values[r], r, have) for r in ranks)] * degree
        case "reduce_scatter":
            return [place(sum(values), r, want) for r in ranks]
        case "all_to_all":
            whole = sum(padded(values[r], r, have) for r in ranks)
            return [place(whole, r, want) for r in ranks]
    raise AssertionError(action)


def _assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], placement: Placement) -> None:
    """Rank by rank; for summands only their sum is determined."""
    if placement == PARTIAL:
        found, expected = [sum(found)], [sum(expected)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_splits_of_several_axes_nest():
    """A rank's part is the intersection of what each axis alone would leave it, in order, however axes are numbered."""
    draw = random.Random(0)
    nested = 0
    for _ in range(600):
        count = draw.choice((2, 3))
        splits = [Split(0, blocks) for blocks in draw.sample((1, 2, 3, 4, 6, 12, 24), count)]
        placed = [(split, draw.choice((2, 3))) for split in splits]
        size = draw.choice((24, 48, 72, 144))
        if not divides((size,), placed):
            continue
        nested += 1
        inwards = sorted(placed, key=lambda cut: cut[0].blocks)
        for ranks in itertools.product(*(range(degree) for _, degree in inwards)):
            part, expected = torch.arange(size), set(range(size))
            for step, ((split, degree), rank) in enumerate(zip(inwards, ranks, strict=True)):
                blocks = local_blocks((size,), placed, placed.index((split, degree)))
                assert blocks == local_blocks((size,), inwards[: step + 1], step)
                part = hand_out(part, Split(0, blocks), degree)[rank]
                expected &= set(hand_out(torch.arange(size), split, degree)[rank].tolist())
            assert part.tolist() == sorted(expected)
            assert local_shape((size,), placed) == tuple(part.shape)
    assert nested > 50
    assert divides((24,), [(Split(0), 2), (Split(0), 4)]) and not divides((12,), [(Split(0), 2), (Split(0), 4)])
    assert not divides((24,), [(Split(0), 2), (Split(0, 3), 2)])  # blocks of 8 would straddle the halves


def test_a_user_registers_a_rule_in_one_line():
    torch.library.define("autopar_test::mix", "(Tensor x, Tensor w, Tensor b) -> Tensor")
    torch.library.impl("autopar_test::mix", "CompositeImplicitAutograd", lambda x, w, b: torch.tanh(x @ w) * b)
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 6, 4), (4, 12), (12,)))
    graph, values = one_op_graph("autopar_test.mix.default", (x, w, b), {})
    assert unknown_ops(graph) == graph.ops
    assert [s.key for s in strategies(graph, graph.ops[0], 2)] == ["-", "shared"]
    table = DEFAULT.register_rule("autopar_test.mix", "... i, i o, o -> ... o", whole=["i"], multiplies=True)
    use_rules(graph, table)
    assert unknown_ops(graph) == ()
    found = strategies(graph, graph.ops[0], 2)
    assert [s.key for s in found] == ["-", "shared", "d0", "d1", "o"]
    assert rule(graph, graph.ops[0]).flops == 2 * 2 * 6 * 4 * 12
    for strategy in found:
        assert check_strategy(graph, values, strategy, 2) == ""
    assert "autopar_test.mix" not in DEFAULT.functions
    with pytest.raises(ValueError, match="has no dim z"):
        DEFAULT.register_rule("autopar_test.mix", "a -> a", whole=["z"])
    with pytest.raises(ValueError, match="target"):
        DEFAULT.register_rule("mix", "a -> a")


def test_a_user_registers_a_stencil():
    """Each place with its neighbours two away, mirrored at the ends: borders come from the ranks beside."""

    def blur(x, w):
        wide = torch.nn.functional.pad(x, (2, 2, 1, 1), mode="reflect")
        high, long = x.shape[2:]
        parts = [wide[:, :, i : i + high, j : j + long] * (1 + i + 2 * j) for i in range(3) for j in (0, 2, 4)]
        return torch.tanh(sum(parts)) * w[:, None, None]

    torch.library.define("autopar_test::blur", "(Tensor x, Tensor w) -> Tensor")
    torch.library.impl("autopar_test::blur", "CompositeImplicitAutograd", blur)
    x, w = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 4, 6, 12), (4,)))
    graph, values = one_op_graph("autopar_test.blur.default", (x, w), {})
    use_rules(graph, DEFAULT.register_rule("autopar_test.blur", "b c h l, c -> b c h l", halo={"h": 1, "l": 2}))
    for degree in (2, 3):
        found = strategies(graph, graph.ops[0], degree)
        assert {"h", "l"} <= {s.key for s in found}
        for strategy in found:
            assert check_strategy(graph, values, strategy, degree) == "", (strategy, degree)
    assert "h" not in {s.key for s in strategies(graph, graph.ops[0], 4)}, "6 rows"
    with pytest.raises(ValueError, match="halo dim a"):
        DEFAULT.register_rule("autopar_test.blur", "a b -> b a", halo={"a": 1})
    with pytest.raises(ValueError, match="has no dim z"):
        DEFAULT.register_rule("autopar_test.blur", "a -> a", halo={"z": 1})


def test_flops_of_contractions():
    cases = {
        ("aten.linear.default", ((2, 6, 4), (8, 4), (8,))): 2 * 2 * 6 * 4 * 8,
        ("aten.addmm.default", ((8,), (6, 4), (4, 8))): 2 * 6 * 4 * 8,
        ("aten.bmm.default", ((2, 6, 4), (2, 4, 8))): 2 * 2 * 6 * 4 * 8,
        ("aten.conv2d.default", ((2, 4, 6, 6), (8, 4, 3, 3))): 2 * 2 * 8 * 4 * 4 * 4 * 9,
        ("aten.scaled_dot_product_attention.default", ((2, 4, 6, 8), (2, 4, 5, 8), (2, 4, 5, 8))): 4 * 8 * 6 * 5 * 8,
        ("aten.mul.Tensor", ((6, 4), (4,))): 24,
    }
    for (target, shapes), flops in cases.items():
        graph, _ = one_op_graph(target, tuple(torch.randn(*s) for s in shapes), {})
        assert rule(graph, graph.ops[0]).flops == flops
    graph, _ = one_op_graph("aten.reshape.default", (torch.randn(6, 4), (24,)), {})
    assert rule(graph, graph.ops[0]).flops == 0


def test_causal_attention_by_rows_skips_half():
    tensors = tuple(torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    graph, _ = one_op_graph("aten.scaled_dot_product_attention.default", (*tensors, None, 0.0, True), {})
    rows = next(s for s in strategies(graph, graph.ops[0], 4) if s.key == "q")
    assert rows.special == "sdpa_rows" and rows.work == 0.5
    assert rows.inputs == (Split(2), SHARED, SHARED) and rows.outputs == (Split(2),)


def test_combine_is_the_inverse_of_hand_out():
    whole = torch.randn(12, 24)
    for placement, degree in itertools.product(PLACEMENTS, (2, 3)):
        assert torch.equal(combine(hand_out(whole, placement, degree), placement), whole)


def test_rules_are_made_once_per_kind_of_block():
    graph = capture(*models.build_mlp(layers=6))
    found = analysis(graph)
    for op in graph.ops:
        found.rule(op)
    assert len(found._rules) < len(graph.ops)
