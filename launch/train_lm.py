"""Trains a language model on the bytes of text files, by a plan that autopar chooses.

    python launch/train_lm.py                                  on one device
    torchrun --nproc-per-node=2 launch/train_lm.py             on two; more hosts as torchrun documents

Without --data the text is the source of the Python standard library. The run folder gets plan.json, metrics.jsonl (one
line a step, and the held-out losses) and trace.json (predicted and measured; open it at https://ui.perfetto.dev).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from console import cluster_text, comparison_text
from model import LanguageModel, ModelConfig
from text import Windows, files_under, read_split, standard_library_files, unigram_entropy
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate
from tqdm import tqdm

import autopar
from autopar.report.trace import save_trace

WARM_UP_STEPS = 2
"""Steps left out of the measured step time: the first ones allocate."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file or a folder of them (default: the standard library)")
    parser.add_argument("--run-dir", type=Path, help="folder for what the run leaves (default: runs/<time>)")

    sizes = parser.add_argument_group("model and batch")
    defaults = ModelConfig()
    sizes.add_argument("--layers", type=int, default=defaults.layers)
    sizes.add_argument("--hidden", type=int, default=defaults.hidden)
    sizes.add_argument("--heads", type=int, default=defaults.heads)
    sizes.add_argument("--kv-heads", type=int, default=defaults.kv_heads)
    sizes.add_argument("--feed-forward", type=int, help="inner size of SwiGLU (default: 8/3 hidden)")
    sizes.add_argument("--seq", type=int, default=256, help="bytes in a row")
    sizes.add_argument("--batch", type=int, default=8, help="rows in the global batch")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=int, default=150)
    training.add_argument(
        "--lr", type=float, default=1.5e-3, help="peak of the cosine schedule, after a tenth of warm-up"
    )
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--held-out-batches", type=int, default=4)
    training.add_argument("--refine-every", type=int, default=0, metavar="N", help="measure and re-plan every N steps")

    plan = parser.add_argument_group("plan", "what is not given is searched")
    plan.add_argument("--plan", type=Path, help="a plan file; then none of the following")
    plan.add_argument("--data-parallel", type=int, dest="data_axis", metavar="N")
    plan.add_argument("--tensor", type=int, metavar="N")
    plan.add_argument("--pipeline", type=int, metavar="N")
    plan.add_argument("--microbatches", type=int, metavar="N")
    plan.add_argument("--zero", type=int, choices=(0, 3))
    plan.add_argument("--recompute", choices=("none", "full"))
    return parser.parse_args()


def join_world() -> tuple[int, torch.device]:
    """Joins torchrun's process group, or a world of one; returns this rank and its device."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.get_rank(), device


def plan_constraints(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `parallelize` that pin the plan or parts of it."""
    given = {
        "plan": arguments.plan,
        "data": arguments.data_axis,
        "tensor": arguments.tensor,
        "pipeline": arguments.pipeline,
        "microbatches": arguments.microbatches,
        "zero": arguments.zero,
        "recompute": arguments.recompute,
    }
    return {name: value for name, value in given.items() if value is not None}


def model_config(arguments: argparse.Namespace) -> ModelConfig:
    # Rounded up to a multiple of 64, which keeps matrix products aligned.
    feed_forward = arguments.feed_forward or -(-8 * arguments.hidden // (3 * 64)) * 64
    return ModelConfig(
        layers=arguments.layers,
        hidden=arguments.hidden,
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        feed_forward=feed_forward,
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first tenth of the steps, then half a cosine down to a tenth of the peak."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def batches(model: Any, dataset: Dataset, batch: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """This rank's rows of each global batch, under the plan that the model has now."""
    for rows in model.loader(dataset, batch):
        yield {name: tensor.to(device) for name, tensor in rows.items()}


@torch.no_grad()
def held_out_loss(model: Any, dataset: Dataset, batch: int, device: torch.device) -> float:
    """Mean over the data set, in nats per byte; the same on every rank."""
    model.eval()
    losses = [model(**rows).item() for rows in batches(model, dataset, batch, device)]
    model.train()
    return statistics.fmean(losses)


def train(
    model: Any,
    dataset: Windows,
    arguments: argparse.Namespace,
    device: torch.device,
    log: Callable[..., None],
    rank: int,
) -> float:
    """The training loop, which knows nothing of the plan. Returns the median step time in seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, arguments.steps))
    step_times_s: list[float] = []
    with tqdm(total=arguments.steps, unit="step", disable=rank != 0, dynamic_ncols=True, mininterval=1.0) as bar:
        source = batches(model, dataset, arguments.batch, device)
        start_s = time.perf_counter()
        for step in range(1, arguments.steps + 1):
            loss = model(**next(source))
            loss.backward()
            gradient_norm = autopar.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            record = {
                "step": step,
                "loss": loss.item(),
                "lr": schedule.get_last_lr()[0],
                "grad_norm": float(gradient_norm),
            }
            schedule.step()
            step_times_s.append(time.perf_counter() - start_s)
            tokens_per_s = arguments.batch * arguments.seq / step_times_s[-1]
            log(**record, step_time_s=step_times_s[-1], tokens_per_s=tokens_per_s)
            bar.set_postfix_str(f"loss {record['loss']:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
            bar.update()
            if arguments.refine_every and step % arguments.refine_every == 0 and step < arguments.steps:
                outcome = model.refine(optimizer, remaining_steps=arguments.steps - step)
                if rank == 0:
                    bar.write(f"refined after step {step}: {outcome}")
                if outcome.moved:
                    step_times_s.clear()
                    rest = Subset(dataset, range(step * arguments.batch, len(dataset)))
                    source = batches(model, rest, arguments.batch, device)
            start_s = time.perf_counter()
    return statistics.median(step_times_s[WARM_UP_STEPS:] or step_times_s)


def metrics_log(file: TextIO | None) -> Callable[..., None]:
    def log(**record: float) -> None:
        if file is not None:
            file.write(json.dumps(record) + "\n")
            file.flush()

    return log


def main() -> None:
    arguments = parse_arguments()
    rank, device = join_world()

    def say(message: str) -> None:
        if rank == 0:
            print(message, flush=True)

    constraints = plan_constraints(arguments)
    files = standard_library_files() if arguments.data is None else files_under(arguments.data)
    training_text, held_out_text = read_split(files)
    training = Windows(training_text, arguments.seq, arguments.steps * arguments.batch, seed=arguments.seed)
    held_out = Windows(held_out_text, arguments.seq, arguments.held_out_batches * arguments.batch)
    say(f"text: {len(files)} files, {len(training_text):,} bytes to train on, {len(held_out_text):,} held out")

    torch.manual_seed(arguments.seed)
    module = LanguageModel(model_config(arguments))
    say(f"model: {sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} million parameters")
    cluster = autopar.Cluster.probe()
    say(cluster_text(cluster))

    start_s = time.perf_counter()
    example = default_collate([training[row] for row in range(arguments.batch)])
    model = autopar.parallelize(module, example, cluster=cluster, **constraints)
    say(f"\n{model.plan.explain(model.graph)}")
    say(f"\ncaptured, planned and placed in {time.perf_counter() - start_s:.1f} s")

    run_dir = arguments.run_dir or Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
    metrics_file = open(run_dir / "metrics.jsonl", "w") if rank == 0 else None  # noqa: SIM115
    log = metrics_log(metrics_file)

    before = held_out_loss(model, held_out, arguments.batch, device)
    log(step=0, held_out_loss=before)
    say(f"\nheld-out loss before training: {before:.3f} nats per byte")
    step_time_s = train(model, training, arguments, device, log, rank)
    # Every rank asks, because gathering a timeline takes all of them; before the evaluation, which is no training step.
    predicted, measured = model.prediction, model.timeline
    after = held_out_loss(model, held_out, arguments.batch, device)
    log(step=arguments.steps, held_out_loss=after)
    say(f"held-out loss after {arguments.steps} steps: {after:.3f} nats per byte")
    say(f"of a predictor that sees no context (unigram entropy): {unigram_entropy(held_out_text):.3f}")

    say("\n" + comparison_text(predicted, step_time_s, measured.peak_memory_bytes if measured else {}))
    if metrics_file is not None:
        metrics_file.close()
        model.plan.save(run_dir / "plan.json")
        save_trace(run_dir / "trace.json", predicted, measured)
    say(f"\nrun folder: {run_dir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
