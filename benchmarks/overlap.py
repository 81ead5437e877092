"""Steps with and without overlap, in turn: what it is worth on links of a given speed.

    python benchmarks/overlap.py                 both configurations, through this machine's memory
    python benchmarks/overlap.py --mbit 1000     the same behind links of that speed (as root: each rank gets a network
                                                 namespace, and a token bucket on its way out)

tensor: two ranks, each product split by columns or by rows; without overlap every conversion is waited for where it
starts, and gradients of weights are computed where autograd meets them. zero3: two ranks; without overlap each block's
parameters are gathered when it is their turn. Both sides run one plan in one pair of processes, on the same batches, and
take turns; a step's time is that of the slower rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.vs_torch import LOSS_TOLERANCE, add_sizes, build, timed  # noqa: E402

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "tensor": {
        "tensor": 2,
        "layout": {
            "*.query": "column", "*.key": "column", "*.value": "column", "*.gate": "column", "*.up": "column",
            "*.output": "row", "*.down": "row",
        },
    },
    "zero3": {"data": 2, "zero": 3},
}  # fmt: skip
RANKS = 2
LEARNING_RATE = 1e-3


@contextlib.contextmanager
def no_overlap() -> Iterator[None]:
    """Models built inside run every collective where it stands."""
    from autopar.runtime import rewrite, shards

    with (
        mock.patch.object(rewrite, "overlapped", lambda calls, *_, **__: list(calls)),
        mock.patch.object(shards.Shards, "_gather_ahead", lambda *_: None),
    ):
        yield


def run_rank(rank: int, options: argparse.Namespace) -> None:
    import autopar

    torch.set_num_threads(1)
    store = dist.TCPStore(options.master, options.port, RANKS, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    device = torch.device("cpu")
    module, batches = build(options, device)
    pins = {"data": 1, "tensor": 1, "pipeline": 1, "microbatches": 1, "recompute": "none"} | CONFIGURATIONS[
        options.name
    ]
    plan = autopar.search(autopar.capture(module, batches[0]), autopar.Cluster.probe(), **pins)
    models = {"with": autopar.parallelize(module, batches[0], plan=plan)}
    module, _ = build(options, device)
    with no_overlap():
        models["without"] = autopar.parallelize(module, batches[0], plan=plan)
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE) for side, model in models.items()}

    def step(side: str, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = models[side](tokens, targets)
        loss.backward()
        optimizers[side].step()
        optimizers[side].zero_grad()
        return loss.detach()

    times: dict[str, list[float]] = {side: [] for side in models}
    for i in range(options.warm_up + options.rounds):
        losses = []
        for side in list(models) if i % 2 else list(models)[::-1]:
            time_s, loss = timed(lambda side=side, i=i: step(side, *batches[i % len(batches)]), device)
            losses.append(loss.item())
            if i >= options.warm_up:
                times[side].append(time_s)
        assert abs(losses[0] / losses[1] - 1) < LOSS_TOLERANCE, losses
    if rank == 0:
        hidden = {side: sum(model.timeline.hidden_s().values()) / RANKS for side, model in models.items()}
        ratios = sorted(a / b for a, b in zip(times["with"], times["without"], strict=True))
        print(
            json.dumps(
                {
                    "median_s": {side: statistics.median(values) for side, values in times.items()},
                    "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
                    "hidden_s": hidden,
                }
            )
        )
    dist.barrier()
    dist.destroy_process_group()


@contextlib.contextmanager
def links(mbit: float | None) -> Iterator[tuple[list[list[str]], str, str]]:
    """Per rank what its command begins with; the first rank's address, and the interface between them."""
    if mbit is None:
        yield [[], []], "127.0.0.1", "lo"
        return
    spaces = [f"overlap{rank}" for rank in range(RANKS)]

    def ip(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, text=True)

    try:
        for space in spaces:
            ip("ip", "netns", "add", space)
        ip("ip", "link", "add", "link0", "netns", spaces[0], "type", "veth", "peer", "link0", "netns", spaces[1])
        for rank, space in enumerate(spaces):
            inside = ("ip", "netns", "exec", space)
            ip(*inside, "ip", "link", "set", "lo", "up")
            ip(*inside, "ip", "addr", "add", f"10.87.0.{rank + 1}/24", "dev", "link0")
            ip(*inside, "ip", "link", "set", "link0", "up")
            shape = ("rate", f"{mbit}mbit", "burst", "256kb", "latency", "50ms")
            ip(*inside, "tc", "qdisc", "add", "dev", "link0", "root", "tbf", *shape)
        yield [["ip", "netns", "exec", space] for space in spaces], "10.87.0.1", "link0"
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)


def compare(name: str, options: argparse.Namespace, arguments: list[str]) -> bool:
    """Print one configuration; whether its ranks ended well."""
    with links(options.mbit) as (prefixes, master, interface), tempfile.TemporaryFile("w+") as output:
        environment = os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [*prefix, sys.executable, __file__, name, *arguments, "--rank", str(rank), "--master", master],
                env=environment,
                stdout=output if rank == 0 else subprocess.DEVNULL,
            )
            for rank, prefix in enumerate(prefixes)
        ]
        if any([process.wait() for process in ranks]):
            return False
        output.seek(0)
        found = json.loads(output.read().strip().splitlines()[-1])
    median_s, (low, high) = found["median_s"], found["quartiles"]
    speed = "this machine's memory" if options.mbit is None else f"{options.mbit:g} Mbit/s"
    print(
        f"{name} over {speed}: {median_s['with'] * 1e3:.1f} ms a step with overlap, {median_s['without'] * 1e3:.1f} without"
    )
    print(
        f"  ratio {median_s['with'] / median_s['without']:.3f} (quartiles of the rounds' ratios {low:.3f} to {high:.3f})"
    )
    print("  of what travels " + ", ".join(f"{1e3 * s:.1f} ms hide {side}" for side, s in found["hidden_s"].items()))
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=list(CONFIGURATIONS), help="default: both")
    parser.add_argument("--mbit", type=float, help="speed of the link between the ranks, Mbit/s each way")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--warm-up", type=int, default=5)
    add_sizes(parser)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--master", default="127.0.0.1", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=29_587, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        run_rank(options.rank, options)
        return
    passed = [word for word in sys.argv[1:] if word not in CONFIGURATIONS]
    names = [options.name] if options.name else list(CONFIGURATIONS)
    raise SystemExit(0 if all([compare(name, options, passed) for name in names]) else 1)


if __name__ == "__main__":
    main()
