"""Initial values: the same weights for the same seed under every layout, and those that building the module gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from autopar.graph import Graph, Tensor
from autopar.runtime.initialise import local_state, local_values
from autopar.runtime.ownership import Holder, Ownership
from autopar.runtime.storage import ParameterSpec
from autopar.sharding.placement import REPLICATED, Split

CPU = torch.device("cpu")


class Norm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Table(nn.Module):
    """A constructor-made buffer, the way rotary tables are."""

    def __init__(self, size: int, base: float = 100.0):
        super().__init__()
        self.size, self.base = size, base
        self.register_buffer("table", base ** (-torch.arange(size) / size), persistent=False)


class Hidden(nn.Module):
    """A table whose making cannot be read back."""

    def __init__(self, length: int):
        super().__init__()
        self.register_buffer("table", torch.arange(2 * length).float())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 12)
        self.attention = nn.MultiheadAttention(12, 2)
        self.table = Table(6)
        self.norm = nn.BatchNorm1d(12)
        self.layers = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 12, bias=False))
        self.head = nn.Linear(12, 24)
        self.head.weight = self.embed.weight


def on_meta(make):
    with torch.device("meta"):
        return make()


def whole_specs(module, holder=None):
    return [
        ParameterSpec(name, p.dtype, Ownership(tuple(p.shape), (holder or Holder((0,), 1, 1, REPLICATED),)))
        for name, p in module.named_parameters()
    ]


def whole_values(module, seed=0, initialise=None):
    return local_values(whole_specs(module), module, 0, seed, CPU, initialise)


def state_of(module):
    """local_state of a graph that has the module's buffers and nothing else."""
    tensors = {
        f"b_{name}": Tensor(f"b_{name}", tuple(b.shape), b.dtype, "buffer", fqn=name)
        for name, b in module.named_buffers()
    }
    graph = Graph("net", tensors, (), (), (), "loss", (), (), frozenset(), (), 1)
    return local_state(graph, module, CPU)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=8, n_head=4, vocab_size=96, n_positions=32))


@pytest.mark.parametrize("make", [Net, llama, gpt2])
def test_equal_under_every_layout(make):
    module = on_meta(make)
    whole = whole_values(module, seed=3)
    other = whole_values(module, seed=4)
    assert any(not torch.equal(whole[n], other[n]) for n in whole)
    assert all(p.is_meta for p in module.parameters()), "the user's module must be left as it was"
    assert all(b.is_meta for b in module.buffers())
    for data, tensor, blocks in ((2, 2, 1), (3, 2, 2), (1, 4, 1)):
        ranks = tuple(range(data * tensor))
        for rank in ranks:
            specs = []
            for name, p in module.named_parameters():
                fits = p.ndim and p.shape[-1] % (tensor * blocks) == 0
                place = Split(p.ndim - 1, blocks) if fits else REPLICATED
                ownership = Ownership(tuple(p.shape), (Holder(ranks, data, tensor, place, data),))
                specs.append(ParameterSpec(name, p.dtype, ownership))
            # A stage has some of the parameters, in an order of its own.
            specs = specs[::-2] + specs[1::3]
            values = local_values(specs, module, rank, 3, CPU)
            for spec in specs:
                assert torch.equal(values[spec.fqn], spec.ownership.take(whole[spec.fqn], rank)), spec.fqn


@pytest.mark.parametrize("make", [Net, llama, gpt2])
def test_same_distribution_as_the_real_module(make):
    """Constants are equal, and random tensors have the scale that building the module gives them."""
    torch.manual_seed(0)
    real = dict(make().named_parameters())
    values = whole_values(on_meta(make))
    assert values.keys() == real.keys()
    for name, value in values.items():
        want = real[name].detach()
        assert value.dtype == want.dtype and value.shape == want.shape
        if want.std(unbiased=False) < 1e-7:
            assert torch.equal(value, want), name
        else:
            assert not torch.equal(value, want)
            tolerance = 4 / value.numel() ** 0.5
            assert abs(value.std() / want.std() - 1) < max(tolerance, 0.1), (name, value.std(), want.std())
            assert value.abs().max() < 3 * want.abs().max()


@pytest.mark.parametrize("make", [Net, llama, gpt2])
def test_buffers_equal_the_real_module(make):
    real = make()
    made, copied = state_of(on_meta(make)), state_of(real)
    assert made.keys() == copied.keys() == {f"b_{name}" for name, _ in real.named_buffers()}
    for name, buffer in real.named_buffers():
        assert torch.equal(made[f"b_{name}"], buffer), name
        assert torch.equal(copied[f"b_{name}"], buffer)
        assert copied[f"b_{name}"].data_ptr() != buffer.data_ptr()


def test_real_module_is_sliced():
    module = nn.Linear(8, 6)
    holder = Holder((0, 1), 1, 2, Split(0))
    for rank in (0, 1):
        values = local_values(whole_specs(module, holder), module, rank, 0, CPU)
        assert torch.equal(values["weight"], module.weight.detach()[3 * rank : 3 * rank + 3])
        assert values["weight"].data_ptr() != module.weight.data_ptr()


def test_what_nothing_initialises_is_named():
    module = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Norm(3)))
    with pytest.raises(ValueError, match=r"1\.weight.*reset_parameters.*initialise="):
        whole_values(module)
    with pytest.raises(ValueError, match="table"):
        state_of(on_meta(lambda: nn.Sequential(Hidden(4))))

    def initialise(part, name):
        if isinstance(part, Norm):
            part.weight.fill_(2)
        else:
            part.weight.normal_()
            part.bias.zero_()

    values = whole_values(module, initialise=initialise)
    assert values["1.weight"].tolist() == [2, 2, 2] and values["0.bias"].tolist() == [0, 0]
    assert torch.equal(values["0.weight"], whole_values(module, initialise=initialise)["0.weight"])


def across_ranks(kind: str) -> dict[str, torch.Tensor] | str:
    """Each rank holds another stage's parameters; only rank 0's module is to count."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    module = on_meta(Net) if kind == "meta" or (kind == "mixed" and rank) else Net()
    if kind == "broken":
        module = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), Norm(3)))
    specs = whole_specs(module, Holder((0, 1), 1, 2, REPLICATED))[rank::2]
    try:
        values = local_values(specs, module, rank, 11, CPU)
    except ValueError as error:
        return str(error)
    return values | state_of(module)


def test_ranks_agree(pool):
    torch.manual_seed(0)
    expected = Net().state_dict()
    table = Table(6).table
    for kind in ("real", "mixed"):
        first, second = pool.run(across_ranks, kind, world_size=2)
        names = [name for name, _ in Net().named_parameters()]
        assert [n for n in first if n in names] == names[::2] and [n for n in second if n in names] == names[1::2]
        for name, value in [*first.items(), *second.items()]:
            want = table if name == "b_table.table" else expected[name.removeprefix("b_")]
            assert torch.equal(value, want), (kind, name)
    first, second = pool.run(across_ranks, "meta", world_size=2)
    alone = whole_values(on_meta(Net), seed=11)
    for name, value in [*first.items(), *second.items()]:
        assert name.startswith("b_") or torch.equal(value, alone[name])
    first, second = pool.run(across_ranks, "broken", world_size=2)
    assert first == second and "1.weight" in first
