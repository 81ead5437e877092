"""The classes of op that a device's rates are keyed by, and what "size" counts for each.

A rate is size / (seconds of one call - launch). Bytes are those of the algorithm, counted alike by the probe and by
cost/compute.py, so a rate is "effective": n is the size of the op's main activation in bytes.

| class          | forward size                                | "<class>_backward" size                        |
|----------------|---------------------------------------------|------------------------------------------------|
| matmul         | flops, 2 M N K                              | flops of one gradient, 2 M N K                 |
| convolution    | flops                                       | flops of one gradient                          |
| attention      | rate: flops 4 B H Sq Sk D (causal: half),   | the same flops                                 |
|                | looked up at the flops of one head          |                                                |
| pointwise      | bytes read and written                      | bytes read and written                         |
| transcendental | bytes read and written                      | 3 n: gradient, saved value, result             |
| gelu           | as transcendental (its formula is longer)   | 3 n                                            |
| softmax        | 2 n                                         | 3 n                                            |
| norm           | 2 n (layer_norm, rms_norm, group_norm)      | 3 n                                            |
| reduction      | bytes read (mean, sum)                      | bytes read and written                         |
| copy           | 2 n (a change of layout)                    | 2 n                                            |
| gather         | 2 n                                         | the whole table + 2 n                          |
| dropout        | 2 n + the mask                              | 2 n + the mask                                 |
| loss           | 2 n, n the logits                           | 5 n                                            |
| optimizer      | 7 parameter sizes of one tensor (AdamW)     |                                                |
"""

from __future__ import annotations

CLASSES = (
    "matmul",
    "convolution",
    "attention",
    "pointwise",
    "transcendental",
    "gelu",
    "softmax",
    "norm",
    "reduction",
    "copy",
    "gather",
    "dropout",
    "loss",
    "view",
    "optimizer",
)

# Counted in flops and measured by dtype; all others are counted in bytes, whatever the dtype.
FLOP_CLASSES = frozenset({"matmul", "convolution", "attention"})

# AdamW reads parameter, gradient and two moments, and writes parameter and two moments.
OPTIMIZER_PASSES = 7


def rate_key(compute_class: str, dtype: str = "", backward: bool = False) -> str:
    """The key of `Device.rates` for a class: "matmul_backward.float32", "softmax", ..."""
    name = compute_class + ("_backward" if backward else "")
    return f"{name}.{dtype}" if compute_class in FLOP_CLASSES else name
