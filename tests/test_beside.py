"""How the calls of a block are ordered so that conversions travel beside others, and what their products leave to them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loopback import run
from torch import nn

from autopar.graph import Ref, iterate_refs
from autopar.runtime.axis import Axis
from autopar.runtime.buckets import GradientReducer, Summand
from autopar.runtime.collectives import convert
from autopar.runtime.deferred import FORMS
from autopar.runtime.emit import Call
from autopar.runtime.overlap import begin, finish, overlapped, product_beside
from autopar.sharding.placement import PARTIAL, REPLICATED, SHARED, Split

aten = torch.ops.aten
AXIS = Axis("tensor", 0, 2, (0, 1), None)


def converted(name: str, have: Any, want: Any) -> Call:
    return Call(convert, (Ref(name), AXIS, have, want, 1, 1, False), (), (f"{name}'",), keep="conversion")


def linear(x: str, weight: str, out: str) -> Call:
    return Call(aten.linear.default, (Ref(x), Ref(weight)), (), (out,), keep="op")


def described(calls: list[Call]) -> list[str]:
    words = {begin: "begin", finish: "finish", product_beside: "beside", convert: "convert"}
    return [f"{words.get(call.function, 'call')} {call.outputs[0].partition('|')[0]}" for call in calls]


def test_what_is_gathered_sets_out_before_what_does_not_need_it() -> None:
    """Queries stay, keys and values are gathered: these go first, and travel while the queries are computed."""
    calls = [
        linear("x", "wq", "q"),
        linear("x", "wk", "k"),
        linear("x", "wv", "v"),
        converted("k", Split(1), REPLICATED),
        converted("v", Split(1), REPLICATED),
        Call(aten.scaled_dot_product_attention.default, (Ref("q"), Ref("k'"), Ref("v'")), (), ("a",), keep="op"),
        linear("a", "wo", "o"),
        converted("o", PARTIAL, REPLICATED),
    ]
    found = overlapped(calls, frozenset({"wq", "wk", "wv", "wo"}))
    assert described(found) == [
        "call k", "begin k'", "call v", "begin v'", "call q", "finish k'", "finish v'", "call a", "call o", "convert o'",
    ]  # fmt: skip


def test_products_of_a_shared_tensor_leave_their_weights_to_it() -> None:
    """Through views and norms, but not through other products, and not where the weight is no parameter."""
    calls = [
        converted("x", REPLICATED, SHARED),
        Call(aten.rms_norm.default, (Ref("x'"), [8], Ref("g")), (), ("n",)),
        linear("n", "w1", "a"),
        linear("a", "w2", "b"),
        linear("x'", "made", "c"),
    ]
    weights = frozenset({"w1", "w2", "g"})
    found = overlapped(calls, weights)
    assert described(found) == ["begin x'", "finish x'", "call n", "beside a", "call b", "call c"]
    assert [ref.name for ref in found[0].args[7:]] == ["w1"]
    # Nothing is left to a parameter's own conversion, nor where the caller wants products whole.
    assert described(overlapped(calls, weights | {"x"})) == described(calls)
    assert described(overlapped(calls, weights, attaches=False)) == described(calls)


@pytest.mark.parametrize("seed", range(40))
def test_random_blocks_keep_their_order(seed: int) -> None:
    """Every call once, behind what it reads; conversions of one kind begin in one order, whatever stands between."""
    draw = random.Random(seed)
    values, calls = ["x"], []
    for number in range(draw.randint(5, 30)):
        kind = draw.choice(["linear", "mul", "convert"])
        source = draw.choice(values)
        if kind == "convert" and f"{source}'" not in values:
            have, want = draw.choice(
                [(PARTIAL, REPLICATED), (REPLICATED, SHARED), (Split(1), SHARED), (PARTIAL, Split(1)), (SHARED, SHARED)]
            )
            calls.append(converted(source, have, want))
        elif kind == "linear":
            calls.append(linear(source, draw.choice("uvw"), f"t{number}"))
        else:
            calls.append(Call(aten.mul.Tensor, (Ref(source), Ref(draw.choice(values))), (), (f"t{number}",)))
        values.append(calls[-1].outputs[0])
    found = overlapped(calls, frozenset("uvw"))
    there = {"x", "u", "v", "w"}
    for call in found:
        assert {ref.name for ref in iterate_refs(call.args)} <= there, described(found)
        there.update(call.outputs)
    assert set(values) <= there
    assert sum(call.function in (convert, finish) for call in found) == sum(c.function is convert for c in calls)
    assert sum(call.is_expensive for call in found) == sum(call.is_expensive for call in calls)


def test_a_weight_without_gradient_may_stand_by() -> None:
    """A product that only says which columns are taken: the loss depends on what it gives, and its weight gets nothing."""
    form = FORMS[aten.linear.default]

    def on_rank() -> None:
        rank = dist.get_rank()
        axis = Axis("tensor", rank, 2, (0, 1), dist.new_group([0, 1]))
        torch.manual_seed(0)
        x = torch.randn(4, 8, requires_grad=True)
        used, idle = (nn.Parameter(torch.randn(8, 8)[rank * 4 : rank * 4 + 4].clone()) for _ in range(2))
        reducer = GradientReducer([Summand("used", used, None, used.dtype), Summand("idle", idle, None, idle.dtype)])
        reducer.begin_step()
        for last in (False, True):
            if last:
                reducer.begin_last_backward()
            travel, token = begin(x, axis, REPLICATED, SHARED, 1, 1, False, used, idle)
            whole = finish(travel, token)
            largest = product_beside(travel, form, (False, True), whole, idle).argmax(-1, keepdim=True)
            product_beside(travel, form, (False, True), whole, used).gather(-1, largest).sum().backward()
        found = reducer.finish()
        assert list(found) == ["used"] and idle.grad is None
        expected, weight = x.detach().clone().requires_grad_(), used.detach().clone().requires_grad_()
        for _ in range(2):
            (expected @ weight.t()).gather(-1, largest).sum().backward()
        torch.testing.assert_close(found["used"], weight.grad)
        both = expected.grad.clone()
        dist.all_reduce(both)
        torch.testing.assert_close(x.grad, both)

    run(on_rank, 2)
