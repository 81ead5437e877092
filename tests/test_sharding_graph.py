"""Whole models under random strategies on a batch x model grid, against the module itself."""

from __future__ import annotations

import random

import models
import pytest
import torch
from emulated_graph import BACKWARD_MEETS, reference, run_emulated
from plan_cases import random_strategies

EXACT = ("build_llama", "build_gpt2", "build_mlp", "build_conv_net", "build_tied_lm", "build_two_inputs")


@pytest.mark.parametrize("name", EXACT)
def test_random_strategies_give_the_modules_loss_and_gradients(name):
    torch.manual_seed(0)
    graph, values, loss, gradients = reference(*getattr(models, name)())
    draw = random.Random(name)
    for shards, degrees in (
        (1, (2,)), (2, (2,)), (4, (2,)), (1, (4,)), (4, (1,)), (1, (2, 2)), (2, (2, 2)), (1, (4, 2)), (1, (2, 2, 2))
    ):  # fmt: skip
        chosen = {op.name: random_strategies(graph, op, degrees, shards, draw, BACKWARD_MEETS) for op in graph.ops}
        found, found_gradients = run_emulated(graph, values, shards, degrees, chosen)
        torch.testing.assert_close(found, loss, rtol=1e-9, atol=1e-9)
        for parameter, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[parameter], gradient, rtol=1e-7, atol=1e-9, msg=parameter)
