"""Decoder-only language models as the published measurements ran them, and their graphs, cheap to capture at any depth.

A graph is captured with three layers on the meta device and lengthened: its middle layer is repeated, which gives the
graph that capture of the whole depth gives (a test holds the two against each other).

Shape legend: B batch rows, S sequence, D hidden, V vocabulary, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autopar.capture.export import capture
from autopar.graph import Block, Graph, Op, Ref, map_refs

_CAPTURED_LAYERS = 3


@dataclass(frozen=True)
class Decoder:
    """norm: "layer" (with bias) or "rms". gated: SwiGLU instead of GELU. rotary: instead of a table of positions.

    explicit_attention: scores and probabilities are materialised, as by Megatron's fused softmax; else the attention
        is one kernel that never does (FlashAttention). grouped: query, key and value are one product.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    length: int
    norm: str = "layer"
    bias: bool = True
    gated: bool = False
    rotary: bool = False
    tied: bool = True
    dropout: float = 0.0
    explicit_attention: bool = False

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def _norm(config: Decoder) -> nn.Module:
    return nn.LayerNorm(config.hidden, bias=config.bias) if config.norm == "layer" else nn.RMSNorm(config.hidden)


class _Attention(nn.Module):
    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        kv_hidden = config.kv_heads * config.head_size
        self.fused = config.kv_heads == config.heads
        if self.fused:
            self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=config.bias)
        else:
            self.query = nn.Linear(config.hidden, config.hidden, bias=config.bias)
            self.key = nn.Linear(config.hidden, kv_hidden, bias=config.bias)
            self.value = nn.Linear(config.hidden, kv_hidden, bias=config.bias)
        self.output = nn.Linear(config.hidden, config.hidden, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:  # B S D -> B S D
        config = self.config
        parts = self.qkv(x).chunk(3, dim=-1) if self.fused else (self.query(x), self.key(x), self.value(x))
        query, key, value = (part.unflatten(-1, (-1, config.head_size)).transpose(1, 2) for part in parts)
        if table is not None:
            query, key = _rotate(query, *table), _rotate(key, *table)
        if config.explicit_attention:
            # Megatron's kernel scales, masks and normalises the scores in one pass over all of them.
            probabilities = torch.softmax(query @ key.transpose(-1, -2), dim=-1)
            mixed = self.dropout(probabilities) @ value
        else:
            grouped = config.kv_heads != config.heads
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return self.output(mixed.transpose(1, 2).flatten(-2))


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:  # B H S E -> B H S E
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class _FeedForward(nn.Module):
    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.feed_forward, bias=config.bias) if config.gated else None
        self.up = nn.Linear(config.hidden, config.feed_forward, bias=config.bias)
        self.down = nn.Linear(config.feed_forward, config.hidden, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:  # B S D -> B S D
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Layer(nn.Module):
    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = _norm(config), _norm(config)
        self.attention, self.feed_forward = _Attention(config), _FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> Tensor:  # B S D -> B S D
        x = x + self.dropout(self.attention(self.attention_norm(x), table))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Model(nn.Module):
    """tokens, targets: B S integers -> mean cross entropy."""

    def __init__(self, config: Decoder) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.positions = None if config.rotary else nn.Embedding(config.length, config.hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = _norm(config)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, table = self.embedding(tokens), None
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        if self.positions is not None:
            x = x + self.positions(positions)
        else:
            size = self.config.head_size
            exponents = torch.arange(0, size, 2, device=tokens.device, dtype=torch.float32) / size
            angles = torch.outer(positions.float(), 10000.0**-exponents)
            angles = torch.cat((angles, angles), dim=-1)
            table = (angles.cos(), angles.sin())
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, table)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.lru_cache(maxsize=64)
def graph_of(config: Decoder, rows: int) -> Graph:
    """The graph of `config` on a batch of `rows`."""
    short = _captured(replace(config, layers=min(config.layers, _CAPTURED_LAYERS)), rows)
    return lengthen(short, config.layers - _CAPTURED_LAYERS) if config.layers > _CAPTURED_LAYERS else short


@functools.lru_cache(maxsize=64)
def _captured(config: Decoder, rows: int) -> Graph:
    with torch.device("meta"):
        module = Model(config)
        tokens = torch.zeros(rows, config.length, dtype=torch.long)
    return capture(module, {"tokens": tokens, "targets": tokens})


def lengthen(graph: Graph, more: int) -> Graph:
    """`graph` with `more` further copies of its repeated block, the last of which is copied."""
    kinds = [block.kind for block in graph.blocks]
    last = max(i for i in range(1, len(kinds)) if kinds[i] == kinds[i - 1])
    block = graph.blocks[last]
    tensors, ops, blocks = dict(graph.tensors), {op.name: op for op in graph.ops}, list(graph.blocks[: last + 1])
    arriving = block.outputs
    for copy in range(more):
        names = dict(zip(block.inputs, arriving, strict=True))
        names |= {n: f"{n}.copy{copy}" for n in block.parameters if n not in graph.shared_parameters}
        for op in graph.block_ops(block):
            names |= {name: f"{name}.copy{copy}" for name in op.outputs}
        for old, new in names.items():
            tensor = graph.tensors[old]
            if new not in tensors:
                fqn = tensor.fqn and f"{tensor.fqn}.copy{copy}"
                tensors[new] = replace(tensor, name=new, fqn=fqn, base=names.get(tensor.base, tensor.base))
        copied = [_renamed(op, names, f".copy{copy}") for op in graph.block_ops(block)]
        ops |= {op.name: op for op in copied}
        arriving = tuple(names[name] for name in block.outputs)
        blocks.append(
            Block(
                len(blocks), block.kind, tuple(op.name for op in copied), blocks[-1].outputs, arriving,
                tuple(names.get(name, name) for name in block.parameters),
            )
        )  # fmt: skip
    names = dict(zip(block.outputs, arriving, strict=True))
    for tail in graph.blocks[last + 1 :]:
        for op in graph.block_ops(tail):
            ops[op.name] = _renamed(op, names, "")
        ends = [tuple(names.get(name, name) for name in part) for part in (tail.inputs, tail.outputs)]
        blocks.append(replace(tail, index=len(blocks), inputs=ends[0], outputs=ends[1]))
    in_blocks = {name for b in blocks for name in b.ops}
    order = [op for op in graph.ops if op.name not in in_blocks] + [ops[name] for b in blocks for name in b.ops]
    return replace(graph, tensors=tensors, ops=tuple(order), blocks=tuple(blocks))


def _renamed(op: Op, names: dict[str, str], suffix: str) -> Op:
    def rename(ref: Ref) -> Ref:
        return Ref(names.get(ref.name, ref.name))

    return Op(
        op.name + suffix,
        op.target,
        tuple(map_refs(value, rename) for value in op.args),
        tuple((key, map_refs(value, rename)) for key, value in op.kwargs),
        tuple(names.get(name, name) for name in op.outputs),
        op.module,
        op.returns_sequence,
        op.random,
        op.no_grad,
        tuple(names.get(name, name) for name in op.saves),
        op.saved_extra_bytes,
    )
