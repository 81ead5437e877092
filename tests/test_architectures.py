"""Twelve architectures of transformers under tensor=2, pipeline=2, data=2 and 2x2, against the eager module.

benchmarks/hf_sweep.py does the same for all of them. Layouts are drawn at random: a strategy for every op. All plans of
a model run on ranks forked from this process, which has captured it once.
"""

from __future__ import annotations

import functools
from typing import Any

import hf_models
import pytest
from forked_parity import Reference, errors, reference
from plan_cases import random_plan
from torch import nn

import autopar
from autopar.graph import Graph

ARCHITECTURES = {
    "dense": "llama",
    "fewer key-value heads than ranks": "gpt_bigcode",
    "ALiBi": "mpt",
    "parallel attention": "gpt_neox",
    "sliding window": "mistral",
    "soft-capped logits": "gemma2",
    "experts, softmax router": "mixtral",
    "experts, grouped sigmoid router, latent attention": "deepseek_v3",
    "experts, one choice, router weights the input": "llama4_text",
    "state space": "mamba",
    "state space and attention": "bamba",
    "gated linear attention": "qwen3_next",
}

PLANS = {
    "tensor=2": dict(data=1, tensor=2, pipeline=1, microbatches=1),
    "pipeline=2": dict(data=1, tensor=1, pipeline=2, microbatches=2),
    "data=2": dict(data=2, tensor=1, pipeline=1, microbatches=1),
    "tensor=2 x pipeline=2": dict(data=1, tensor=2, pipeline=2, microbatches=2),
}

Built = tuple[nn.Module, dict[str, Any], Graph, Reference]


@functools.lru_cache(maxsize=1)
def built(name: str) -> Built:
    module, example = hf_models.build(name)
    return module, example, autopar.capture(module, example), reference(module, example)


@pytest.mark.processes
@pytest.mark.parametrize("name", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_one_step_in_parity(name: str) -> None:
    module, example, graph, expected = built(name)
    for degrees in PLANS.values():
        found = errors(module, example, graph, random_plan(graph, **degrees), expected)
        assert found.within(loss=1e-5, gradient=1e-4), (degrees, found)
