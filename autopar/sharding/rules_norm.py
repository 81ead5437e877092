"""Rules of normalisations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from .call import Call
from .notation import Dims
from .rule import Rule, Special
from .rules_pointwise import RuleFunction, full


def layer_norm(call: Call) -> Rule:
    """layer_norm, rms_norm: statistics over the trailing dims; rows are independent."""
    shape = call.shape("input")
    count = len(call["normalized_shape"])
    lead = len(shape) - count
    norm: Dims = tuple((f"n{i}",) for i in range(count))
    dims = (*full(shape[:lead]), *norm)
    statistics: Dims = (*full(shape[:lead]), *((),) * count)
    return call.rule(
        {"input": dims, "weight": norm, "bias": norm},
        [dims, statistics, statistics][: len(call.outputs)],
        blocked={f"n{i}": "the statistics run over it" for i in range(count)},
        flops=8 * math.prod(shape),
    )


def group_norm(call: Call) -> Rule:
    """Channels are (groups, channels of a group): whole groups may be split, and space, over which statistics are summed."""
    shape = call.shape("input")
    groups = call["num_groups"]
    inner = tuple((f"x{i}",) for i in range(len(shape) - 2))
    dims = (("b",), ("g", "c"), *inner)
    return call.rule(
        {"input": dims, "weight": (("g", "c"),), "bias": (("g", "c"),)},
        [dims],
        sizes={"g": groups, "c": shape[1] // groups},
        blocked={"c": "a group's statistics run over it"},
        specials={f"x{i}": _summed("group_norm", shape[0] * groups) for i in range(len(inner))},
        flops=8 * math.prod(shape),
    )


def batch_norm(call: Call) -> Rule:
    """In training every channel's statistics run over the whole batch and all places, so rows meet; in evaluation none do."""
    shape = call.shape("input")
    channel: Dims = (("c",),)
    dims = tuple(("c",) if i == 1 else (f"d{i}",) for i in range(len(shape)))
    training = call.get("training", call.get("train", call.get("use_input_stats", False)))
    reason = "batch norm in training takes its statistics over the whole batch"
    blocked = {f"d{i}": reason for i in range(len(shape)) if i != 1} if training else {}
    running, specials = channel, {}
    if training and call.packet == "aten.batch_norm":
        # The statistics of parts of the batch or of space are reduced; running statistics are whole on every rank, and
        # stay so. Forward: sums and a count, then squares; backward: two sums, in float32.
        inner = Special("batch_norm", collective_bytes=4 * (4 * shape[1] + 1), collectives=3, composes=True)
        specials |= {**dict.fromkeys(blocked, inner), "d0": Special("batch_norm", meets=reason)}
        blocked.clear()
        if call.has("running_mean"):
            running = (("s",),)
            blocked["s"] = "running statistics are whole on every rank"
            specials["c"] = Special("batch_norm", collective_bytes=8 * shape[1], composes=True)
    return call.rule(
        {
            "input": dims,
            **dict.fromkeys(("weight", "bias"), channel),
            **dict.fromkeys(("running_mean", "running_var"), running),
        },
        [dims, channel, channel][: len(call.outputs)],
        blocked=blocked,
        specials=specials,
        batch_only=["d0"],
        flops=8 * math.prod(shape),
    )


def instance_norm(call: Call) -> Rule:
    """Every row and channel by itself; space may be split where no running statistics are kept."""
    shape = call.shape("input")
    channel: Dims = (("c",),)
    dims = (("b",), ("c",), *((f"x{i}",) for i in range(len(shape) - 2)))
    places = [f"x{i}" for i in range(len(shape) - 2)]
    blocked, specials = {}, {name: _summed("instance_norm", shape[0] * shape[1]) for name in places}
    if call.has("running_mean"):
        specials = {}
        blocked = dict.fromkeys(places, "the statistics run over it")
        blocked["b"] = "running statistics average over the batch"
    inputs = {"input": dims, **dict.fromkeys(("weight", "bias", "running_mean", "running_var"), channel)}
    return call.rule(inputs, [dims], blocked=blocked, specials=specials, flops=8 * math.prod(shape))


def _summed(name: str, count: int) -> Special:
    """Sums and then squares of `count` groups are reduced in float32, and both ways."""
    return Special(name, collective_bytes=16 * count, collectives=4, composes=True)


RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {
        "aten.layer_norm": layer_norm,
        "aten.rms_norm": layer_norm,
        "aten.group_norm": group_norm,
        "aten.batch_norm": batch_norm,
        "aten.instance_norm": instance_norm,
    }
)
