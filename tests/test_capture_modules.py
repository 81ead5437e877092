"""Capture of awkward modules: in-place updates, buffers, frozen parts, all losses, and random nets."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import ROWS, check_values
from test_capture import assert_same_step, check_structure, gradients, run
from torch import Tensor, nn

from autopar.capture.export import capture

WIDTH = 8


class Applied(nn.Module):
    """A linear layer, `function` on its output, and a square mean."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return (self.function(self.linear(x)) ** 2).mean()


def _add(y: Tensor) -> Tensor:
    y = y * 2
    y += 1
    return y


def _row(y: Tensor) -> Tensor:
    y = y * 2
    y[:, 1] = 3.0
    y[2:4, ::2] += y[4:6, 1::2]
    y[-1] *= 2
    return y


def _views(y: Tensor) -> Tensor:
    y = y * 1.5
    left, right = y[:, :4], y[:, 4:]
    flat = y.view(2, -1)
    left.add_(right)
    flat[0].mul_(2)
    return y.t()[:4] @ left + flat.sum()


def _chained(y: Tensor) -> Tensor:
    y = y * 0.5
    z = y.view(4, 2, WIDTH).transpose(0, 1)
    z[0, 1:].unsqueeze(0).zero_()
    z.masked_fill_(z > 2, 0.5)
    return y + z.sum()


def _fresh(y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[0] = y[1]
    out[1:].copy_(y[:-1])
    return out * torch.tensor([1.0, 2.0] * 4)


def _unbound(y: Tensor) -> Tensor:
    """Views of multi-view ops may be written where no gradient flows."""
    table = torch.arange(float(WIDTH * ROWS)).view(ROWS, WIDTH)
    parts = table.unbind(1)
    parts[2].add_(parts[3])
    _, right = table.split([3, 5], 1)
    right.mul_(0.5)
    table.chunk(4)[2].diagonal().zero_()
    return y * table + parts[4]


def _relu(y: Tensor) -> Tensor:
    return F.dropout(F.relu_(y * 1), 0.0)


def _index(y: Tensor) -> Tensor:
    y = y * 2
    y[torch.tensor([0, 3])] = 1.0
    y.index_add_(0, torch.tensor([1, 1]), y[:2] * 3)
    return y.clamp_(min=-0.5)


FUNCTIONS = [_add, _row, _views, _chained, _fresh, _unbound, _relu, _index]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_in_place_updates_become_functional(function: Any) -> None:
    torch.manual_seed(0)
    module, x = Applied(function), torch.randn(ROWS, WIDTH)
    kept = x.clone()
    graph = assert_same_step(module, x, eager=module(x))
    check_structure(graph)
    assert torch.equal(x, kept)
    assert not any(op.target.split(".")[1].endswith("_") for op in graph.ops)


@pytest.mark.parametrize("seed", range(12))
def test_random_in_place_programs(seed: int) -> None:
    """Views of views written in random order: every value is what eager storage sharing gives."""

    def program(y: Tensor) -> Tensor:
        rng = random.Random(seed)
        family = [y * 1.0]
        for _ in range(10):
            t = rng.choice(family)
            kind = rng.randrange(7)
            if kind == 0 and t.dim() > 1:
                family.append(t.transpose(0, -1))
            elif kind == 1 and t.shape[0] > 2:
                family.append(t[1 :: rng.choice((1, 2))])
            elif kind == 2 and t.dim() > 1:
                family.append(t[rng.randrange(t.shape[0])])
            elif kind == 3:
                family.append(t.unsqueeze(rng.randrange(t.dim() + 1)))
            elif kind == 4:
                t.mul_(rng.choice((0.5, -1.0)))
            elif kind == 5:
                t += rng.choice(family).sum().tanh()
            else:
                t.copy_(torch.full((), float(rng.randrange(3))))
        return y + family[0] + sum(t.sum() for t in family)

    torch.manual_seed(seed)
    module, x = Applied(program), torch.randn(4, WIDTH)
    check_structure(assert_same_step(module, x, eager=module(x)))


class WithBatchNorm(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=affine)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += x.shape[0]
        return (self.linear(self.norm(x)) * self.seen.sum()).square().mean()


@pytest.mark.parametrize("affine", [True, False])
def test_buffer_updates_stay_and_run_once(affine: bool) -> None:
    torch.manual_seed(0)
    module, x = WithBatchNorm(affine), torch.randn(ROWS, WIDTH) + 2
    graph = capture(module, x)
    check_structure(graph)
    start = {k: v.clone() for k, v in module.state_dict().items()}
    expected = module(x)
    expected_gradients = gradients(module, expected)
    after = {k: v.clone() for k, v in module.state_dict().items()}
    assert not torch.equal(after["norm.running_mean"], start["norm.running_mean"])
    module.load_state_dict(start)
    found = run(graph, module, x)[graph.loss]
    assert torch.allclose(found, expected, rtol=1e-6)
    for name, gradient in gradients(module, found).items():
        assert torch.allclose(gradient, expected_gradients[name], rtol=1e-5)
    for name, value in module.state_dict().items():
        assert torch.equal(value, after[name]), name
    written = {op.name for op in graph.ops if "batch_norm" in op.target or "add_" in op.target.split(".")[1]}
    assert written and not written & graph.side_ops


class Mixed(nn.Module):
    """A frozen layer, a no-grad branch, a detached branch, autocast switched off, and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.first, self.second = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.first(x).sigmoid()
            kept = scale.view(scale.shape)
            with torch.enable_grad():
                inner = self.first(x)
        y = self.frozen(self.first(x)) * kept
        with torch.autocast("cpu", enabled=False):
            y = self.second(y).relu() + inner
        return (y * y.detach()).sum() / y.shape[0]


def test_gradients_flow_where_the_module_lets_them() -> None:
    torch.manual_seed(0)
    module, x = Mixed(), torch.randn(ROWS, WIDTH)
    graph = assert_same_step(module, x, eager=module(x))
    check_structure(graph)
    assert {t.fqn for t in graph.parameters} == {n for n, _ in module.named_parameters()}
    assert not graph.tensors["frozen.weight"].requires_grad and graph.tensors["first.weight"].requires_grad
    values = run(graph, module, x)
    for name, tensor in graph.tensors.items():
        if name in values:
            assert values[name].requires_grad == tensor.requires_grad, name
            assert tuple(values[name].shape) == tensor.shape and values[name].dtype == tensor.dtype


class Rotated(nn.Module):
    """A table written place by place under no_grad, an assertion about values, and a constant of Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("frequencies", torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        check_values(x)
        with torch.no_grad():
            table = torch.arange(WIDTH).float() * self.frequencies
            table[..., : WIDTH // 2] = table[..., 1::2].cos()
            table += torch.distributions.Normal(0, 1).icdf(torch.tensor(0.9))
        return (self.linear(x) * table).square().mean()


def test_what_no_parameter_touches_may_be_written_under_no_grad() -> None:
    torch.manual_seed(0)
    module, x = Rotated(), torch.randn(ROWS, WIDTH)
    check_structure(assert_same_step(module, x, eager=module(x)))


def test_what_a_parameter_touches_may_not_be_written_under_no_grad() -> None:
    def write(y: Tensor, view: bool) -> Tensor:
        out = y * 1.0
        target = out[:, :2] if view else out
        with torch.no_grad():
            target.mul_(2.0)
        return out

    for view in (False, True):
        with pytest.raises(ValueError, match="under no_grad"):
            capture(Applied(functools.partial(write, view=view)), torch.randn(ROWS, WIDTH))


LOSSES = {
    "cross_entropy_weighted": lambda s, t: F.cross_entropy(s, t[0], weight=torch.arange(1.0, WIDTH + 1)),
    "cross_entropy_smoothed": lambda s, t: F.cross_entropy(s, t[0], label_smoothing=0.1),
    "cross_entropy_both": lambda s, t: F.cross_entropy(
        s, t[0], torch.arange(1.0, WIDTH + 1), ignore_index=-1, label_smoothing=0.2
    ),
    "cross_entropy_sum": lambda s, t: F.cross_entropy(s, t[0], reduction="sum"),
    "cross_entropy_none": lambda s, t: F.cross_entropy(s, t[0], reduction="none").mean(),
    "cross_entropy_probabilities": lambda s, t: F.cross_entropy(s, t[1].softmax(-1)),
    "cross_entropy_images": lambda s, t: F.cross_entropy(s.view(2, 4, WIDTH).transpose(1, 2), t[0].view(2, 4)),
    "cross_entropy_bfloat16": lambda s, t: F.cross_entropy(s.bfloat16(), t[0]).float(),
    "nll": lambda s, t: F.nll_loss(s.log_softmax(-1), t[0]),
    "nll_images": lambda s, t: F.nll_loss(
        s.log_softmax(-1).view(2, 4, WIDTH, 1).transpose(1, 2).contiguous(), t[0].view(2, 4, 1)
    ),
    "mse": lambda s, t: F.mse_loss(s, t[1]),
    "mse_sum": lambda s, t: F.mse_loss(s, t[1], reduction="sum"),
    "l1": lambda s, t: F.l1_loss(s, t[1]),
    "smooth_l1": lambda s, t: F.smooth_l1_loss(s, t[1], beta=0.3),
    "huber": lambda s, t: F.huber_loss(s, t[1], delta=0.4),
    "bce": lambda s, t: F.binary_cross_entropy(s.sigmoid(), t[1].sigmoid(), weight=t[1].exp()),
    "bce_logits": lambda s, t: F.binary_cross_entropy_with_logits(s, t[1].sigmoid(), pos_weight=t[1].exp()[0]),
    "kl": lambda s, t: F.kl_div(s.log_softmax(-1), t[1].softmax(-1), reduction="batchmean"),
    "soft_margin": lambda s, t: F.soft_margin_loss(s, t[1].sign()),
    "multi_margin": lambda s, t: F.multi_margin_loss(s, t[0].clamp(min=0)),
}


class Scores(nn.Module):
    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.linear, self.loss = nn.Linear(WIDTH, WIDTH), loss

    def forward(self, x: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(self.linear(x), targets)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_sums_over_elements(name: str) -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, WIDTH, (ROWS,))
    if not name.startswith("multi"):
        labels[[1, 2, 3, 6]] = -1 if "both" in name else -100
    module, example = Scores(LOSSES[name]), (torch.randn(ROWS, WIDTH), (labels, torch.randn(ROWS, WIDTH)))
    tolerance = 1e-2 if "bfloat16" in name else 1e-6
    graph = capture(module, example)
    check_structure(graph)
    expected, found = module(*example), run(graph, module, example)[graph.loss]
    assert found.dtype == expected.dtype and abs(found.item() - expected.item()) <= tolerance * abs(expected.item())
    expected_gradients, found_gradients = gradients(module, expected), gradients(module, found)
    for key, gradient in expected_gradients.items():
        assert (gradient - found_gradients[key]).norm() <= 10 * tolerance * gradient.norm()
    targets = [op.target for op in graph.ops]
    if name.startswith(("cross", "nll")) and "none" not in name:
        assert sum(t.startswith("autopar.") for t in targets) == (1 if "sum" in name else 2)
        assert not any(op.target == "autopar.target_count" and op.name not in graph.side_ops for op in graph.ops)


def _random_net(seed: int) -> nn.Module:
    rng = random.Random(seed)

    class Net(nn.Module):
        """Layers over a pool of earlier activations: chains, residuals and long skips."""

        def __init__(self) -> None:
            super().__init__()
            self.steps = [
                (rng.choice(("linear", "linear", "norm", "relu", "add", "cat")), rng.random(), rng.random())
                for _ in range(rng.randrange(4, 24))
            ]
            self.repeats = rng.choice((1, 1, 2, 5))
            self.layers = nn.ModuleList(
                nn.ModuleList(
                    nn.Linear(WIDTH * (1 + (kind == "cat")), WIDTH) if kind != "norm" else nn.LayerNorm(WIDTH)
                    for kind, _, _ in self.steps
                )
                for _ in range(self.repeats)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layers in self.layers:
                pool = [x]
                for (kind, a, b), layer in zip(self.steps, layers, strict=True):
                    # The square root prefers recent tensors, so that nets are deep and skips are of all lengths.
                    first, second = pool[int(len(pool) * a**0.3)], pool[int(len(pool) * b)]
                    if kind == "relu":
                        pool.append(first.relu())
                    elif kind == "add":
                        pool.append(first + second)
                    elif kind == "cat":
                        pool.append(layer(torch.cat((first, second), -1)))
                    else:
                        pool.append(layer(first))
                x = sum(pool[-2:])
            return x.square().mean()

    torch.manual_seed(seed)
    return Net()


@pytest.mark.parametrize("seed", range(25))
def test_random_nets_are_partitioned(seed: int) -> None:
    module, x = _random_net(seed), torch.randn(ROWS, WIDTH)
    if module(x).requires_grad:  # a net may consist of skips alone
        check_structure(capture(module, x))


def test_repeated_random_nets_share_kinds() -> None:
    found = 0
    for seed in range(60):
        module = _random_net(seed)
        if module.repeats == 5 and len(module.steps) > 6:
            kinds = [b.kind for b in capture(module, torch.randn(ROWS, WIDTH)).blocks]
            found += max(map(kinds.count, kinds)) >= 4
    assert found >= 5
