"""Event simulation of a task graph in which a change re-simulates only what can be affected.

Tasks run on resources (a device's compute, a link), each one at a time, in the order in which they become ready:

    ready(t) = max over the tasks that t waits for of end      start(t) = max(ready(t), end of the task before it)
    end(t)   = start(t) + duration(t)                          order on a resource: by (ready, id)

Ids are topological (a task waits for lower ids only), so these equations have one solution, which `simulate_fully`
finds event by event. Nothing that is ready before the first changed task depends on the change; `Simulation.update`
keeps all of that and replays the rest, with the same additions and maxima, so the two agree to the last bit.

Reference: Jia, Zaharia and Aiken, "Beyond Data and Model Parallelism for Deep Neural Networks" (FlexFlow), MLSys
2019, section 5, whose delta simulation follows dependencies instead of time.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Hashable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Task:
    """duration_s on one resource, once all of `after` (task ids, all lower, each once) have ended."""

    duration_s: float
    resource: Hashable
    after: tuple[int, ...] = ()


def simulate_fully(tasks: Mapping[int, Task]) -> dict[int, float]:
    """When each task ends."""
    waiting = {i: len(task.after) for i, task in tasks.items()}
    followers: dict[int, list[int]] = {i: [] for i in tasks}
    for i, task in tasks.items():
        for before in task.after:
            followers[before].append(i)
    heap = [(0.0, i) for i, count in waiting.items() if not count]
    heapq.heapify(heap)
    free: dict[Hashable, float] = {}
    ends: dict[int, float] = {}
    while heap:
        ready_s, i = heapq.heappop(heap)
        task = tasks[i]
        ends[i] = free[task.resource] = max(ready_s, free.get(task.resource, 0.0)) + task.duration_s
        for follower in followers[i]:
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(heap, (max(ends[before] for before in tasks[follower].after), follower))
    assert len(ends) == len(tasks), "the tasks wait for each other in a circle"
    return ends


class Simulation:
    """A simulated task graph that can be changed. `num_updated`: tasks that the last update computed again."""

    def __init__(self, tasks: Mapping[int, Task]) -> None:
        self.tasks: dict[int, Task] = {}
        self.ends: dict[int, float] = {}
        self.num_updated = 0
        self._followers: dict[int, set[int]] = {}
        # events in order: (ready, id), and when the tasks end
        self._events: list[tuple[float, int]] = []
        self._ready: dict[int, float] = {}
        self.update(tasks)

    @property
    def finish_s(self) -> float:
        """When the last task of any resource ends."""
        return max(self.ends.values(), default=0.0)

    def update(self, changes: Mapping[int, Task | None]) -> dict[int, Task | None]:
        """Replace, add or (None) remove tasks; returns the changes that take it back."""
        undo: dict[int, Task | None] = {i: self.tasks.get(i) for i in changes}
        first = min((self._ready[i] for i in changes if i in self._ready), default=float("inf"))
        for i, task in changes.items():
            for before in old.after if (old := undo[i]) is not None else ():
                self._followers[before].discard(i)
            if task is None:
                self.tasks.pop(i, None)
                continue
            self.tasks[i] = task
            for before in task.after:
                assert before < i, f"task {i} waits for {before}, which is not lower"
                self._followers.setdefault(before, set()).add(i)
        for task in changes.values():
            # a task that waits for a changed one is ready no sooner than that
            if task is not None and not any(before in changes for before in task.after):
                first = min(first, max((self.ends[before] for before in task.after), default=0.0))
        self._replay(first)
        return undo

    def _replay(self, first_s: float) -> None:
        """Keep the events before first_s and simulate the others again."""
        kept = bisect.bisect_left(self._events, (first_s, -1))
        free: dict[Hashable, float] = {}
        for _, i in self._events[:kept]:
            free[self.tasks[i].resource] = self.ends[i]
        done = {i for _, i in self._events[:kept]}
        for _, i in self._events[kept:]:
            del self.ends[i], self._ready[i]
        del self._events[kept:]
        waiting: dict[int, int] = {}
        heap: list[tuple[float, int]] = []
        for i, task in self.tasks.items():
            if i not in done:
                waiting[i] = sum(before not in done for before in task.after)
                if not waiting[i]:
                    heap.append((max((self.ends[before] for before in task.after), default=0.0), i))
        heapq.heapify(heap)
        self.num_updated = len(waiting)
        while heap:
            event = heapq.heappop(heap)
            ready_s, i = event
            task = self.tasks[i]
            self._events.append(event)
            self._ready[i] = ready_s
            self.ends[i] = free[task.resource] = max(ready_s, free.get(task.resource, 0.0)) + task.duration_s
            for follower in self._followers.get(i, ()):
                waiting[follower] -= 1
                if not waiting[follower]:
                    heapq.heappush(heap, (max(self.ends[b] for b in self.tasks[follower].after), follower))
        assert len(self.ends) == len(self.tasks), "the tasks wait for each other in a circle"
