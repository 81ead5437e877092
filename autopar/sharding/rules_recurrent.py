"""Rules of recurrent layers: rows of the batch are independent, time and features are not."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .call import Call
from .notation import Dims
from .rule import Rule
from .rules_pointwise import RuleFunction


def recurrent(call: Call) -> Rule | None:
    """lstm, gru, rnn of padded batches: input [b, t, i] (or [t, b, i]), states [layers, b, h] -> output, states."""
    if call.overload != "input" or len(call.shape("input")) != 3:
        return None
    at = 0 if call["batch_first"] else 1

    def dims(rank: int, name: str, batch: int) -> Dims:
        return tuple(("b",) if i == batch else (f"{name}{i}",) for i in range(rank))

    states = call.positions()["hx"]
    inputs: dict[str, Dims | list[Dims]] = {
        "input": dims(3, "x", at),
        "hx": [dims(3, f"h{n}_", 1) for n in states] if len(states) > 1 else dims(3, "h0_", 1),
        "params": [dims(len(call.inputs[n].shape), f"w{n}_", -1) for n in call.positions()["params"]],
    }
    outputs = [dims(3, "y", at), *(dims(3, f"o{n}_", 1) for n in range(1, len(call.outputs)))]
    everything = [one for d in inputs.values() for one in (d if isinstance(d, list) else [d])] + outputs
    names = {name for one in everything for dim in one for name in dim} - {"b"}
    blocked = dict.fromkeys(names, "a recurrent layer needs whole rows")
    hours = call.shape("input")[1 - at] * call.shape("input")[at]
    weights = sum(call.inputs[n].numel for n in call.positions()["params"])
    return call.rule(inputs, outputs, blocked=blocked, flops=2 * hours * weights)


RULES: Mapping[str, RuleFunction] = MappingProxyType(
    {f"aten.{name}": recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
)
