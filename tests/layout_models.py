"""Real models for tests of the layout solver, with given prices and hand-made layouts in the manner of Megatron."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from autopar.capture.export import capture
from autopar.graph import Graph, Op
from autopar.plan import Layout
from autopar.sharding.named_layouts import megatron_layouts
from autopar.sharding.placement import REPLICATED, Placement, Split, conversion
from autopar.sharding.strategies import rule, strategies
from autopar.sharding.strategy import Strategy


@functools.cache
def llama(hidden=64, layers=3, heads=8, key_heads=4, vocabulary=256, mlp=176, batch=8, length=32, tied=False) -> Graph:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, use_cache=False, tie_word_embeddings=tied,
    )  # fmt: skip
    return _language_model(LlamaForCausalLM, config, batch, length)


@functools.cache
def gpt2(hidden=64, layers=3, heads=8, vocabulary=256, batch=8, length=32) -> Graph:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=heads, vocab_size=vocabulary, use_cache=False)
    return _language_model(GPT2LMHeadModel, config, batch, length)


def _language_model(cls, config, batch: int, length: int) -> Graph:
    with torch.device("meta"):
        module = cls(config)
        tokens = torch.zeros(batch, length, dtype=torch.long)
    return capture(module, {"input_ids": tokens, "labels": tokens})


CONTRACTIONS = ("linear", "addmm", "scaled_dot_product_attention")


@dataclass(frozen=True)
class GivenCosts:
    """Roofline compute, ring collectives, AdamW state; all figures given. `flight` microbatches are held at once."""

    graph: Graph
    degree: int
    flops_per_s: float = 100e12
    bytes_per_s: float = 1e12
    latency_s: float = 5e-6
    bandwidth_bytes_per_s: float = 100e9
    all_reduce: float = 1.0  # factors on the ring's time
    reduce_scatter: float = 1.0
    all_to_all: float = 1.0
    microbatches: int = 8
    shards: int = 1
    flight: int = 1
    rest_s_per_byte: float = 0.0

    def strategies(self, op: Op) -> tuple[Strategy, ...]:
        return strategies(self.graph, op, self.degree, self.shards)

    def op_s(self, op: Op, strategy: Strategy) -> tuple[float, float]:
        # Everything but contractions is bound by memory.
        flops = rule(self.graph, op).flops / self.shards if op.target.split(".")[1] in CONTRACTIONS else 0.0
        names = zip((*op.inputs, *op.outputs), (*strategy.inputs, *strategy.outputs), strict=True)
        size = sum(self._bytes(name, placement) for name, placement in names)
        forward = max(flops * strategy.work / self.flops_per_s, size / self.bytes_per_s)
        if strategy.collective_bytes:
            forward += self._action("all_reduce", strategy.collective_bytes / self.shards)
        return forward, 2 * forward if self.graph.tensors[op.outputs[0]].requires_grad else 0.0

    def conversion_s(self, tensor: str, have: Placement, want: Placement) -> tuple[float, float]:
        done = conversion(have, want)
        whole = self._bytes(tensor, REPLICATED)
        requires_grad = self.graph.tensors[tensor].requires_grad
        is_parameter = self.graph.tensors[tensor].role == "parameter"
        once = is_parameter and not isinstance(have, Split)
        forward = self._action(done.forward, whole)
        backward = self._action(done.backward, whole) if requires_grad else 0.0
        return forward, backward / self.microbatches if once else backward

    def rest_s(self, parameter: str, placement: Placement) -> float:
        return self.rest_s_per_byte * self.rest_bytes(parameter, placement) / self.microbatches

    def rest_bytes(self, parameter: str, placement: Placement) -> float:
        return 4 * self._bytes(parameter, placement)

    def saved_bytes(self, tensor: str, placement: Placement) -> float:
        return self.flight * self._bytes(tensor, placement)

    def saved_extra_bytes(self, op: Op, strategy: Strategy) -> float:
        return self.flight * op.saved_extra_bytes * strategy.work / self.shards

    def input_bytes(self, tensor: str, placement: Placement) -> float:
        return 0.0

    def _bytes(self, tensor: str, placement: Placement) -> float:
        t = self.graph.tensors[tensor]
        size = t.size_bytes / (self.shards if t.role == "activation" else 1)
        return size / self.degree if isinstance(placement, Split) else size

    def _action(self, action: str, size: float) -> float:
        parts = {
            "all_reduce": 2 * self.all_reduce, "all_gather": 1.0, "reduce_scatter": self.reduce_scatter,
            "all_to_all": self.all_to_all / self.degree,
        }  # fmt: skip
        if action in parts:
            part_s = self.latency_s + size / self.degree / self.bandwidth_bytes_per_s
            return parts[action] * (self.degree - 1) * part_s
        return self.latency_s + size / self.bytes_per_s if action in ("mask", "pad") else 0.0


def megatron(graph: Graph, degree: int, costs, sequence: bool) -> tuple[Layout, ...]:
    """Megatron's layouts, built by hand out of the strategies that `costs` offers."""
    return megatron_layouts(graph, degree, sequence=sequence, options=costs.strategies)
