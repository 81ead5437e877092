"""Capture's opaque modules, and its errors: each says what was given, what was expected, and what to change."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ROWS, build_llama, build_mlp, eager_loss
from test_capture import assert_same_step, check_structure, run
from test_capture_modules import WIDTH, Applied
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.capture.opaque import opaque
from autopar.ops import OPAQUE


@opaque
class Loop(nn.Module):
    """Control flow that depends on values, with a parameter, a buffer and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("offset", torch.ones(WIDTH))

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        while y.norm() > 3:
            y = y / 2
        return y * scale + self.offset, y.tanh()


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().mean()


class Holder(nn.Module):
    def __init__(self, loop: nn.Module) -> None:
        super().__init__()
        self.first, self.loop, self.last = nn.Linear(WIDTH, WIDTH), loop, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.loop(self.first(x), scale=2.0)
        return (self.last(a) * self.loop(b)[1]).square().mean()


def test_opaque_modules_stay_whole() -> None:
    torch.manual_seed(0)
    module, x = Holder(Loop()), torch.randn(ROWS, WIDTH)
    graph = assert_same_step(module, x, eager=module(x))
    check_structure(graph)
    calls = [op for op in graph.ops if op.target == OPAQUE]
    assert len(calls) == 2 and dict(graph.opaque_modules) == {"loop": module.loop}
    assert all({"loop.linear.weight", "loop.linear.bias", "loop.offset"} <= set(op.inputs) for op in calls)
    assert all(op.saves or op.saved_extra_bytes for op in calls)
    assert "forward" not in module.loop.__dict__
    with torch.device("meta"):
        meta = Holder(Loop())
    assert capture(meta, x.to("meta")).fingerprint == graph.fingerprint


def test_untraceable_modules_name_the_line() -> None:
    class Plain(Loop):
        _autopar_opaque = False

    message = r"line \d+ of .*test_capture_errors.py, `while y.norm\(\) > 3:`.*loop.*opaque"
    module, x = Holder(Plain()), torch.randn(ROWS, WIDTH)
    with pytest.warns(UserWarning, match="Plain is kept whole.*" + message):
        graph = capture(module, x)
    assert dict(graph.opaque_modules) == {"loop": module.loop}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture(Holder(opaque(Plain())), x).fingerprint == graph.fingerprint
    with pytest.raises(ValueError, match=r"line \d+ of .*`while y.norm\(\) > 3:`.*opaque"):
        capture(Plain(), x)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * 3

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Doubled.apply(x)

    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), Inner(), nn.Linear(WIDTH, WIDTH), Mean())
    with pytest.warns(UserWarning, match="Inner is kept whole.*Doubled cannot be traced"):
        assert_same_step(module, x, eager=module(x))
    with pytest.raises(ValueError, match=r"Doubled cannot be traced \(line \d+ .*opaque"):
        capture(Applied(Doubled.apply), torch.randn(ROWS, WIDTH))
    with pytest.raises(ValueError, match=r"line \d+ of .*self.function.*depends on the values"):
        capture(Applied(lambda y: y[y.detach().nonzero()[:, 0]]), torch.randn(ROWS, WIDTH))
    with pytest.raises(ValueError, match=r"line \d+ of .*self.function.*depends on the values"):
        capture(Applied(lambda y: y * y.sum().item()), torch.randn(ROWS, WIDTH))
    with pytest.raises(ValueError, match="opaque.*marks an nn.Module"):
        opaque(3)


def test_a_failed_capture_leaves_the_module_as_it_was() -> None:
    module = Holder(Loop()).eval()
    parameters = list(module.parameters())
    for bad in (torch.randn(ROWS, WIDTH + 1), torch.randn(ROWS, 3)):
        with pytest.raises(ValueError):
            capture(module, bad)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert not module.training and "forward" not in module.loop.__dict__


def _ids() -> Tensor:
    return torch.zeros(ROWS, 16, dtype=torch.long)


BAD = {
    "missing": (lambda: (build_mlp()[0], {}, F.cross_entropy), "missing a required .* 'input'.*expected: .input."),
    "unexpected": (
        lambda: (build_mlp()[0], {"input": torch.randn(8, 16), "labels": _ids()}, None),
        "unexpected keyword argument 'labels'",
    ),
    "too many": (lambda: (build_mlp()[0], (torch.randn(8, 16), _ids()), None), "too many .*Given: a tuple of 2"),
    "not an example": (lambda: (build_mlp()[0], "text", None), "the example is a str"),
    "key": (lambda: (build_mlp()[0], {0: _ids()}, None), "key 0 is a int"),
    "no batch": (lambda: (build_mlp()[0], (torch.tensor(1.0),), None), "no tensor with a batch dim"),
    "no labels": (lambda: (build_llama()[0], {"input_ids": _ids()}, None), "returned no loss.*labels.*loss=f"),
    "no loss": (lambda: (nn.ModuleList(), _ids(), None), "missing|too many|does not fit|no loss"),
    "not scalar": (
        lambda: (build_mlp()[0], torch.randn(8, 16), None),
        r"Sequential returned is a tensor of shape \[8, 8\].*scalar",
    ),
    "loss not scalar": (
        lambda: (build_mlp()[0], (torch.randn(8, 16), torch.randn(8, 8)), lambda a, b: a - b),
        r"loss function <lambda> returned is a tensor of shape \[8, 8\]",
    ),
    "loss not tensor": (lambda: (build_mlp()[0], torch.randn(8, 16), lambda a: 1.0), "returned a float"),
    "loss arity": (lambda: (build_mlp()[0], torch.randn(8, 16), lambda a, b: a), "1 target|0 target"),
    "frozen": (
        lambda: (build_mlp()[0].requires_grad_(False), (torch.randn(8, 16), _ids()[:, 0]), F.cross_entropy),
        "no trainable parameter",
    ),
    "not a module": (lambda: (F.relu, torch.randn(8, 16), None), "takes an nn.Module"),
    "wrong width": (
        lambda: (build_mlp()[0], (torch.randn(8, 5), _ids()[:, 0]), F.cross_entropy),
        r"in module '0' \(Linear\).*5\D.*16\D.*32.*Check that the example",
    ),
    "autocast": (
        lambda: (Applied(_autocast), torch.randn(8, WIDTH), None),
        r"line \d+ .*self.function.*torch.autocast.*opaque",
    ),
}


def _autocast(y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return y @ y.t()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_message(name: str) -> None:
    make, message = BAD[name]
    module, example, loss = make()
    with pytest.raises(ValueError, match=message) as caught:
        capture(module, example, loss)
    assert len(str(caught.value)) < 900


def test_same_tensor_twice_stays_two_inputs() -> None:
    module, example, _ = build_llama(layers=1)
    ids = example["input_ids"]
    graph = capture(module, {"input_ids": ids, "labels": ids})
    assert graph.inputs == ("input_ids", "labels")
    assert graph.fingerprint == capture(module, example).fingerprint
    expected = eager_loss(module, example, None)
    assert torch.allclose(run(graph, module, example)[graph.loss], expected, rtol=1e-6)
