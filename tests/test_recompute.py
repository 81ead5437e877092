"""Recomputation per block: the same results, the work of the expensive ops done once, and the memory given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from storage_cases import CountCollectives
from test_parity import call, one_step, parallel
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from autopar.runtime.recompute import call_block

CHOICES = ("none", "selective", "full")


@pytest.mark.parametrize(
    ("name", "plans"),
    [
        (
            "build_llama",
            [
                dict(data=1, tensor=2, pipeline=2, microbatches=4, recompute="selective", seed=3),
                dict(data=2, tensor=2, pipeline=1, microbatches=2, recompute="mixed", zero=3, seed=4),
                dict(data=2, tensor=1, pipeline=2, microbatches=2, recompute="mixed", zero=2, seed=5),
            ],
        ),
        ("build_conv_net", [dict(data=2, tensor=2, pipeline=1, microbatches=2, recompute="selective", seed=6)]),
        ("build_gpt2", [dict(data=1, tensor=4, pipeline=1, microbatches=1, recompute="mixed", seed=7)]),
    ],
)
def test_results_are_the_same(pool, name: str, plans: list[dict[str, Any]]) -> None:
    for found in pool.run(one_step, name, plans, world_size=4, timeout_s=120):
        for plan, (loss, gradient, evaluated) in zip(plans, found, strict=True):
            assert loss < 1e-6 and evaluated < 1e-6 and gradient < 1e-5, (plan, loss, gradient, evaluated)


class Living(TorchDispatchMode):
    """The bytes of what was made under it and still lives."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._made[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def size_bytes(self) -> int:
        return sum(size for storage, size in self._made.values() if not storage.expired())


def work(choice: str, tensor: int) -> tuple[int, dict[str, int], list[int], dict[str, torch.Tensor]]:
    """One step: floating-point operations, collectives, bytes kept after each block's forward, gradients."""
    plan = dict(data=1, tensor=tensor, pipeline=1, microbatches=1, recompute=choice, seed=2)
    model, example, _, _ = parallel("build_gpt2_dropout", plan)
    with FlopCounterMode(display=False) as flops, CountCollectives() as collectives:
        call(model, example).backward()
    executor, kept = model.runtime.executor, []

    def watched(*arguments):
        result = call_block(*arguments)
        kept.append(living.size_bytes())
        return result

    with pytest.MonkeyPatch.context() as patch, Living() as living:
        patch.setattr("autopar.runtime.executor.call_block", watched)
        call(model, example)
    assert len(kept) == len(executor.parts[0].compiled.blocks)
    gradients = {name: getattr(p.grad, "_local_tensor", p.grad) for name, p in model.named_parameters()}
    return flops.get_total_flops(), collectives.found, kept, gradients


@pytest.mark.parametrize("tensor", [1, 2])
def test_work_is_repeated_and_memory_freed_as_the_choice_says(pool, tensor: int) -> None:
    none, selective, full = (pool.run(work, choice, tensor, world_size=tensor)[0] for choice in CHOICES)
    assert none[0] == selective[0]
    assert full[0] >= 1.25 * none[0]
    assert none[1] == selective[1]
    assert tensor == 1 or sum(full[1].values()) > sum(none[1].values())
    # Under a random layout conversions make more than autograd would have saved.
    if tensor == 1:
        assert full[2][-2] < 0.5 * selective[2][-2] and selective[2][-2] < 0.85 * none[2][-2], (full, selective, none)
    for other in (selective, full):
        for name, gradient in none[3].items():
            torch.testing.assert_close(other[3][name], gradient)
