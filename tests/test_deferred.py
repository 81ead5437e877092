"""Backwards in halves: each form against autograd, and what of a model waits for the weight half."""

from __future__ import annotations

import contextlib
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import autopar
from autopar.plan import Plan, Stage
from autopar.runtime.deferred import FORMS, Owed, product
from autopar.runtime.rewrite import Chunk
from autopar.runtime.stage import compile_stage

aten = torch.ops.aten


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def cases() -> list[tuple[Any, tuple[Any, ...]]]:
    ids = torch.randint(0, 7, (3, 4))
    return [
        (aten.linear.default, (draw(5, 4), draw(3, 4), draw(3))),
        (aten.linear.default, (draw(2, 3, 5, 4), draw(3, 4))),
        (aten.linear.default, (draw(4), draw(3, 4), draw(3))),
        (aten.linear.default, (draw(6, 2, 4).transpose(0, 1), draw(3, 4), None)),
        (aten.addmm.default, (draw(3), draw(5, 4), draw(4, 3))),
        (aten.mm.default, (draw(5, 4), draw(4, 3))),
        (aten.embedding.default, (draw(7, 4), ids)),
        (aten.embedding.default, (draw(7, 4), ids, 2)),
        (aten.embedding.default, (draw(7, 4), ids, 2, True)),
        (aten.conv1d.default, (draw(2, 4, 9), draw(6, 4, 3), draw(6), [2])),
        (aten.conv2d.default, (draw(2, 4, 9, 8), draw(6, 4, 3, 2))),
        (aten.conv2d.default, (draw(2, 4, 9, 8), draw(6, 2, 3, 2), draw(6), [2, 1], [1, 2], [1, 2], 2)),
        (aten.conv3d.default, (draw(2, 2, 5, 6, 4), draw(3, 2, 2, 2, 2), None, [1, 1, 1], [1, 0, 1])),
    ]


def grads(tensors: list[Tensor]) -> list[Tensor | None]:
    found = [None if t.grad is None else t.grad.clone() for t in tensors]
    for tensor in tensors:
        tensor.grad = None
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("index", range(len(cases())))
def test_every_form_agrees_with_autograd(index: int, recompute: bool) -> None:
    torch.manual_seed(index)
    function, drawn = cases()[index]
    args = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in drawn)
    form = FORMS[function]
    weights = [args[p] for p in (form.weight, form.bias) if p is not None and p < len(args) and args[p] is not None]
    trained = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = function(*args)
    slope = torch.randn_like(out)
    out.backward(slope)
    expected = grads(trained)

    which = tuple(any(a is w for w in weights) for a in args)
    chunk = Chunk(0, 1, lambda key: contextlib.nullcontext(), owed=Owed())
    arrivals: list[int] = []
    handles = [w.register_post_accumulate_grad_hook(lambda t: arrivals.append(id(t))) for w in weights]
    call = lambda: product(chunk, form, which, *args)  # noqa: E731
    again = checkpoint(call, use_reentrant=False) if recompute else call()
    assert torch.equal(again, out)
    again.backward(slope)
    assert not arrivals and all(w.grad is None for w in weights), "the weight half came with the input half"
    assert all((a.grad is not None) == (not any(a is w for w in weights)) for a in trained)
    chunk.owed.settle()
    assert sorted(arrivals) == sorted(map(id, weights)), "each weight gets its gradient at once"
    for handle in handles:
        handle.remove()
    for found, wanted in zip(grads(trained), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)

    # What is not put off comes with the input half, and frozen weights get nothing.
    product(chunk, form, (False,) * len(args), *args).backward(slope)
    for found, wanted in zip(grads(trained), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weights[0].requires_grad_(False)
    if any(a.requires_grad for a in trained):
        product(chunk, form, which, *args).backward(slope)
    chunk.owed.settle()
    assert weights[0].grad is None


@pytest.mark.parametrize(
    ("name", "put_off", "at_once"),
    [
        ("build_llama", ["proj.weight", "embed_tokens.weight", "lm_head.weight"], ["norm.weight", "layernorm.weight"]),
        ("build_gpt2", ["c_attn.weight", "c_fc.bias", "c_proj.weight"], ["ln_1.weight", "wte.weight"]),
        ("build_mlp", ["weight", "bias"], []),
        ("build_conv_net", ["first.weight", "second.bias", "out.weight"], ["first_norm.weight", "second_norm.bias"]),
    ],
)
def test_products_of_a_model_wait_and_the_rest_does_not(name: str, put_off: list[str], at_once: list[str]) -> None:
    module, example, loss = getattr(models, name)()
    graph = autopar.capture(module, example, loss)
    stage = Stage(0, len(graph.blocks), (0,), 1)
    found: dict[str, dict[str, Tensor]] = {}
    early: set[str] = set()
    for schedule in ("1f1b", "zb-h1"):
        plan = Plan(graph.name, graph.fingerprint, 1, graph.batch_size, 1, schedule, (stage,))
        compiled = compile_stage(graph, plan, 0, 0, {}, torch.device("cpu"))
        own = dict(module.named_parameters(remove_duplicate=False))
        leaves = {t.name: own[t.fqn].detach().clone().requires_grad_() for t in graph.parameters}
        values = {t: graph.constants[t] for t in graph.constants}
        values |= {t.name: module.get_buffer(t.fqn) for t in graph.tensors.values() if t.role == "buffer"}
        args = example if isinstance(example, tuple) else ()
        values |= {
            n: args[k] if isinstance(k, int) else example[k]
            for n, k in zip(graph.inputs, graph.input_keys, strict=True)
        }
        chunk = Chunk(0, 1, lambda key: contextlib.nullcontext())
        chunk.owed = Owed() if schedule == "zb-h1" else None
        whole: tuple[Tensor, ...] = ()
        if compiled.prologue_function:
            whole = compiled.prologue_function(chunk, [values[t] for t in compiled.prologue_batch], ())
        made = compiled.side_function(chunk, [values[t] for t in compiled.side_batch], whole)
        sides = dict(zip(compiled.sides, made, strict=True))
        activations: tuple[Tensor, ...] = ()
        for block in compiled.blocks:
            parameters = tuple(leaves[t] for t, _ in block.parameters)
            activations = block.training(chunk, parameters, activations, [sides[t] for t in block.sides])
        activations[-1].backward()
        early = {graph.tensors[t].fqn for t, leaf in leaves.items() if leaf.grad is not None}
        if chunk.owed:
            chunk.owed.settle()
        found[schedule] = {graph.tensors[t].fqn: leaf.grad for t, leaf in leaves.items()}
    late = set(found["zb-h1"]) - early
    assert all(any(fqn.endswith(end) or end in fqn for fqn in late) for end in put_off), (early, late)
    assert all(any(end in fqn for fqn in early) for end in at_once), (early, late)
    assert not at_once or early
    for fqn, gradient in found["1f1b"].items():
        torch.testing.assert_close(found["zb-h1"][fqn], gradient, rtol=1e-5, atol=1e-7)
