"""Refinement from wrong numbers: the cluster is described with a network many times too fast, and measurement mends it.

    torchrun --standalone --nproc-per-node=2 benchmarks/refine.py

Prints the plan that the true (probed) numbers give, the plan that the wrong ones give, and what each refinement learnt and
did while one training loop ran; ends with status 1 unless the last plan has the degrees of the true one. The losses are
those of one uninterrupted run: the same model trained by the true plan from the start is the check.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
from model import LanguageModel, ModelConfig  # noqa: E402

import autopar  # noqa: E402
from autopar.cluster.spec import Cluster, Link  # noqa: E402
from autopar.plan import Plan  # noqa: E402


def faster(link: Link, times: float) -> Link:
    """The link with its bandwidths multiplied and its latencies divided."""
    return replace(
        link,
        latency_s=link.latency_s / times,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * times,
        collectives={k: (latency / times, rate * times) for k, (latency, rate) in link.collectives.items()},
    )


def degrees(plan: Plan) -> str:
    stage = plan.stages[0]
    return (
        f"pipeline {len(plan.stages)} x data {stage.data} x tensor {stage.tensor}, zero {stage.zero}, "
        f"{plan.microbatches} microbatches"
    )


def shape(plan: Plan) -> tuple[int, int, int, int]:
    stage = plan.stages[0]
    return len(plan.stages), stage.data, stage.tensor, stage.zero


def train(
    model: autopar.Model, optimizer: torch.optim.Optimizer, batches: list[dict[str, torch.Tensor]]
) -> list[float]:
    losses = []
    for batch in batches:
        loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=50.0, help="how much too fast the network is said to be")
    parser.add_argument("--rounds", type=int, default=3, help="refinements at most")
    parser.add_argument("--steps", type=int, default=8, help="steps between refinements")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=128)
    arguments = parser.parse_args()

    true = Cluster.probe()

    def say(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    wrong = replace(
        true, intra=faster(true.intra, arguments.times), inter=faster(true.inter, arguments.times), source="wrong"
    )
    config = ModelConfig(
        layers=arguments.layers, hidden=arguments.hidden, heads=4, kv_heads=4, feed_forward=arguments.hidden * 3
    )
    generator = torch.Generator().manual_seed(1)
    num_steps = arguments.steps * (arguments.rounds + 1)
    rows = [torch.randint(0, 256, (arguments.batch, arguments.seq + 1), generator=generator) for _ in range(num_steps)]
    batches = [{"tokens": r[:, :-1].contiguous(), "targets": r[:, 1:].contiguous()} for r in rows]

    losses = []
    for cluster in (true, wrong):
        torch.manual_seed(0)
        model = autopar.parallelize(LanguageModel(config), batches[0], cluster=cluster)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        say(f"\nwith the {cluster.source} numbers: {degrees(model.plan)}")
        found = []
        if cluster is true:
            expected = model.plan
            found = train(model, optimizer, batches)
        else:
            for start in range(0, num_steps, arguments.steps):
                found += train(model, optimizer, batches[start : start + arguments.steps])
                if start + arguments.steps < num_steps:
                    outcome = model.refine(optimizer, remaining_steps=10_000)
                    say(f"after step {start + arguments.steps}: {outcome}\n  now {degrees(model.plan)}")
        losses.append(found)
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses[1], losses[0], strict=True))
    say(f"\nlosses of the refined run against the run by the true plan: at most {worst:.1e} apart (relative)")
    agrees = shape(model.plan) == shape(expected)
    say(f"the plan that refinement ended on {'is' if agrees else 'IS NOT'} the true numbers' plan")
    dist.destroy_process_group()
    sys.exit(0 if agrees and worst < 1e-4 else 1)


if __name__ == "__main__":
    main()
