"""What `--cluster` says: a file written by `Cluster.save`, or hosts x preset x devices per host, one or several kinds."""

from __future__ import annotations

import re
from pathlib import Path

from .cluster.presets import PRESETS
from .cluster.spec import Cluster

_SHORTHAND = re.compile(r"\s*(-?\d+)\s*x\s*(.+?)\s*x\s*(-?\d+)\s*", re.IGNORECASE)
FORM = (
    "<hosts>x<preset>x<devices per host>, such as 16xh100-80gbx8, or several of these joined by +, such as "
    "2xa100-80gbx8+4xv100-32gbx4"
)


def read_cluster(text: str) -> Cluster:
    """The cluster that `text` names. ValueError for an unknown preset (with the nearest names) or no such form."""
    matches = [_SHORTHAND.fullmatch(part) for part in text.split("+")]
    if Path(text).is_file() or (None in matches and (text.endswith(".json") or "/" in text)):
        try:
            return Cluster.load(text)
        except UnicodeDecodeError:
            raise ValueError(f"{text} is no text; expected a file written by Cluster.save") from None
    if None in matches:
        raise ValueError(
            f"--cluster {text!r} is neither a cluster file nor of the form {FORM}; presets are {', '.join(PRESETS)}"
        )
    kinds = [match.groups() for match in matches]
    return Cluster.join(
        *(Cluster.preset(preset_name(name), hosts=int(hosts), devices_per_host=int(n)) for hosts, name, n in kinds)
    )


def preset_name(name: str) -> str:
    """The preset that `name` means: itself, or the only one that it begins ("h100"). ValueError where several do.

    A name that begins none is returned as it is, for `Cluster.preset` to tell the nearest.
    """
    lowered = name.lower()
    longer = [preset for preset in PRESETS if preset.startswith(f"{lowered}-")]
    if lowered in PRESETS or not longer:
        return lowered
    if len(longer) > 1:
        raise ValueError(f"preset {name!r} could be {' or '.join(longer)}; write one of them in full")
    return longer[0]
