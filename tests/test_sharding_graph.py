"""Whole models under random strategies on a batch x model grid, against the module itself."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping
from typing import Any

import models
import pytest
import torch
from emulated_graph import run_emulated

from autopar.capture.export import capture
from autopar.graph import Graph
from autopar.sharding.strategies import strategies

EXACT = ("build_llama", "build_gpt2", "build_mlp", "build_conv_net", "build_tied_lm", "build_two_inputs")


def reference(name: str) -> tuple[Graph, dict[str, torch.Tensor], torch.Tensor, dict[str, torch.Tensor]]:
    """Graph, values of its leaves in float64, loss and gradients of the whole graph in float64.

    The latter agree with the module's own, in the module's float32.
    """
    module, example, loss_function = getattr(models, name)()
    example = (example,) if isinstance(example, torch.Tensor) else example
    graph = capture(module, example, loss_function)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    values = {t.name: state[t.fqn].detach() for t in graph.tensors.values() if t.role in ("parameter", "buffer")}
    values |= graph.constants
    values |= {t: _entry(example, key) for t, key in zip(graph.inputs, graph.input_keys, strict=True)}
    values = _double(values)
    loss, gradients = run_emulated(graph, values, 1, 1, {})
    takes = inspect.signature(module.forward).parameters
    entries = example.items() if isinstance(example, Mapping) else zip(takes, example, strict=False)
    inputs = {key: value for key, value in entries if key in takes}
    out = module(**inputs)
    if loss_function is None:
        own = out if isinstance(out, torch.Tensor) else out["loss"]
    else:
        everything = example.values() if isinstance(example, Mapping) else example
        own = loss_function(out, *list(everything)[len(inputs) :])
    own.backward()
    torch.testing.assert_close(loss.float(), own.detach(), rtol=1e-5, atol=1e-6)
    by_name = dict(module.named_parameters())
    for t in graph.parameters:
        torch.testing.assert_close(gradients[t.name].float(), by_name[t.fqn].grad, rtol=1e-3, atol=1e-5)
    return graph, values, loss, gradients


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _double(v) for k, v in value.items()}
    return tuple(map(_double, value)) if isinstance(value, tuple | list) else value


def _entry(example: Any, key: Any) -> torch.Tensor:
    for part in key if isinstance(key, tuple) else (key,):
        example = example[part]
    return example


@pytest.mark.parametrize("name", EXACT)
def test_random_strategies_give_the_modules_loss_and_gradients(name):
    torch.manual_seed(0)
    graph, values, loss, gradients = reference(name)
    draw = random.Random(name)
    for shards, degree in ((1, 2), (2, 2), (4, 2), (1, 4), (4, 1)):
        chosen = {op.name: draw.choice(strategies(graph, op, degree, shards)) for op in graph.ops}
        found, found_gradients = run_emulated(graph, values, shards, degree, chosen)
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-7, atol=1e-9, msg=parameter)
