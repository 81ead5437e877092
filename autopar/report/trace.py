"""Timelines as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

The format is the "JSON Object Format" of the Trace Event Format document: complete events ("ph": "X") with times in
microseconds, and metadata events ("ph": "M") that name processes and threads.

Predicted and measured are two processes, each with one thread per rank. Sends run beside the compute, and slices of one
thread must nest; so the sends of each direction have a thread of their own below their rank's. What was measured beside
the instructions are asynchronous events ("ph": "b" and "e"), which may overlap.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autopar.timeline import Event, Timeline

# Threads of a rank: its instructions, then what its links carry. The position is part of the thread's number.
_LANES = ("", " sends activations", " sends gradients")
_LANE = {"SA": 1, "SG": 2}
_NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward of inputs",
    "W": "backward of weights",
    "P": "prologue",
    "D": "reduce gradients",
    "O": "optimizer",
    "U": "update",
    "WS": "stash weights",
    "WR": "restore weights",
    "SA": "send activation",
    "RA": "receive activation",
    "SG": "send gradient",
    "RG": "receive gradient",
}


def save_trace(path: str | Path, predicted: Timeline | None, measured: Timeline | None) -> None:
    """Write the trace of one or both timelines to `path`; ValueError without any."""
    if predicted is None and measured is None:
        raise ValueError("there is no timeline to save: give predicted, measured or both")
    trace = trace_object(predicted, measured)
    Path(path).write_text(json.dumps(trace, separators=(",", ":")), encoding="utf-8")


def trace_object(predicted: Timeline | None, measured: Timeline | None) -> dict[str, Any]:
    """The trace as plain data, ready for JSON."""
    found = [
        (pid, name, line)
        for pid, name, line in ((1, "predicted", predicted), (2, "measured", measured))
        if line is not None
    ]
    return {
        "traceEvents": [event for pid, name, line in found for event in _process(pid, name, line)],
        "displayTimeUnit": "ms",
        "otherData": {f"{name}_step_time_s": line.step_time_s for _, name, line in found},
    }


def _process(pid: int, name: str, line: Timeline) -> Iterator[dict[str, Any]]:
    yield _metadata("process_name", pid, 0, {"name": name})
    yield _metadata("process_sort_index", pid, 0, {"sort_index": pid})
    for rank, events in line.by_rank().items():
        threads = {_thread(event) for event in events}
        for thread in sorted(threads):
            yield _metadata("thread_name", pid, thread, {"name": f"rank {rank}{_LANES[thread % len(_LANES)]}"})
            yield _metadata("thread_sort_index", pid, thread, {"sort_index": thread})
        for event in events:
            yield {
                "name": event.token,
                "cat": _NAMES.get(event.kind, event.kind),
                "ph": "X",
                "pid": pid,
                "tid": _thread(event),
                "ts": event.start_s * 1e6,
                "dur": event.duration_s * 1e6,
                "args": {"kind": _NAMES.get(event.kind, event.kind), "bytes": event.bytes},
            }
    for number, transfer in enumerate(line.transfers):
        common = {"name": transfer.token, "cat": "transfer", "id": number, "pid": pid, "tid": _thread(transfer)}
        yield {**common, "ph": "b", "ts": transfer.start_s * 1e6, "args": {"bytes": transfer.bytes}}
        yield {**common, "ph": "e", "ts": transfer.end_s * 1e6}
    for wait in line.waits:
        # Inside of the event of the instruction that waits.
        common = {"name": f"wait: {wait.token}", "cat": "wait", "pid": pid, "tid": len(_LANES) * wait.rank}
        yield {**common, "ph": "X", "ts": wait.start_s * 1e6, "dur": wait.duration_s * 1e6}
    for rank, size_bytes in line.peak_memory_bytes.items():
        if rank in {event.rank for event in line.events}:
            yield {
                "name": f"peak memory of rank {rank}",
                "ph": "C",
                "pid": pid,
                "ts": 0,
                "args": {"bytes": size_bytes},
            }


def _thread(event: Event) -> int:
    return len(_LANES) * event.rank + _LANE.get(event.kind, 0)


def _metadata(name: str, pid: int, tid: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": arguments}
