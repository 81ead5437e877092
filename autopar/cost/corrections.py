"""What measurement has taught: factors on the cost model's figures. All 1 where nothing was learnt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..cluster.rates import CLASSES
from ..cluster.ring import COLLECTIVES


@dataclass(frozen=True, slots=True)
class Corrections:
    """compute: by class of cluster/rates.py, factors on its (forward, backward) seconds.
    links: by "intra" or "inter" and collective, factors on (latency, bandwidth).
    memory: on activation and transient bytes.
    """

    compute: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    links: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    memory: float = 1.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.compute if name not in CLASSES]
        unknown += [f"{where}/{kind}" for where, kind in self.links if kind not in COLLECTIVES or where[:3] != "int"]
        if unknown:
            raise ValueError(f"corrections name unknown classes or links: {', '.join(unknown)}")
        for factor in (self.memory, *(f for pair in (*self.compute.values(), *self.links.values()) for f in pair)):
            if not 0 < factor < math.inf:
                raise ValueError(f"a correction is a positive factor; got {factor!r}")

    def seconds(self, compute_class: str, backward: bool) -> float:
        """The factor on the seconds of a class."""
        return self.compute.get(compute_class, (1.0, 1.0))[backward]

    def link(self, where: str, kind: str) -> tuple[float, float]:
        """(latency factor, bandwidth factor) of a collective on "intra" or "inter"."""
        return self.links.get((where, kind), (1.0, 1.0))

    def to_json(self) -> str:
        links = {f"{where}/{kind}": pair for (where, kind), pair in self.links.items()}
        return json.dumps({"compute": dict(self.compute), "links": links, "memory": self.memory}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Corrections:
        """The inverse of `to_json`; ValueError for anything else."""
        try:
            data = json.loads(text)
            compute = {name: (float(f), float(b)) for name, (f, b) in data["compute"].items()}
            links = {}
            for key, (latency, bandwidth) in data["links"].items():
                where, kind = key.split("/")
                links[where, kind] = (float(latency), float(bandwidth))
            return cls(compute, links, float(data["memory"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not corrections as written by to_json ({type(error).__name__}: {error})") from None
