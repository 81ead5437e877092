"""How long a search may go on: a limit of wall time, an event that asks it to stop, a clock, and the progress bar.

Every search asks `expired` in its loops and ends with the best plan that it has. The time limit never ends a search that
has no plan yet, because a plan a little late is worth more than none; a stop asked for from outside does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from tqdm import tqdm

# Bars of searches that end sooner than this are not shown.
BAR_DELAY_S = 2.0


class Stop(Protocol):
    """What can ask a search to stop: a `threading.Event`, or anything else with its `is_set`."""

    def is_set(self) -> bool: ...


class Budget:
    """One search's time; its clock starts when it is made.

    limit_s: seconds of wall time. stop: ends the search at once when set, from any thread. progress: whether to show
    bars. clock: seconds that never decrease. ValueError for a limit that is no number of at least 0.
    """

    def __init__(
        self,
        limit_s: float | None = None,
        stop: Stop | None = None,
        progress: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        is_number = isinstance(limit_s, int | float) and not isinstance(limit_s, bool)
        if limit_s is not None and not (is_number and limit_s >= 0):
            raise ValueError(
                f"time_limit_s={limit_s!r}: expected a number of seconds of at least 0, or None for a search without a limit"
            )
        self.limit_s, self.progress = limit_s, progress
        self._stop, self._clock = stop, clock
        self._start_s = clock()
        # Why the search ended before it was done, "" as long as it did not.
        self.cut_short = ""
        self._interrupted = False

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._start_s

    @property
    def left_s(self) -> float:
        """Seconds until the limit, 0 after it, infinite without one: for solvers that take a limit of their own."""
        return math.inf if self.limit_s is None else max(0.0, self.limit_s - self.elapsed_s)

    def expired(self, has_plan: bool = True) -> bool:
        """Whether to end the search now; then `cut_short` says why.

        has_plan: whether the search has a plan to return; as long as it has none only `stop` ends it.
        """
        if self._stop is not None and self._stop.is_set():
            self.cut_short = self.cut_short or "when it was asked to stop"
            return True
        if self._interrupted:
            return True
        if has_plan and self.limit_s is not None and self.elapsed_s >= self.limit_s:
            self.cut_short = self.cut_short or f"by time_limit_s={self.limit_s:g}"
            return True
        return False

    def interrupted(self) -> None:
        """Note that Ctrl-C ended the search; from now on it is `expired`."""
        self.cut_short = self.cut_short or "by an interrupt"
        self._interrupted = True

    def bar(self, name: str, unit: str, total: int | None = None) -> tqdm:
        """A progress bar that shows only if the search takes long, and leaves nothing behind. Close it, or use `with`."""
        return tqdm(
            desc=name, unit=unit, total=total, delay=BAR_DELAY_S, leave=False, disable=not self.progress
        )  # fmt: skip

    def no_plan(self, method: str) -> ValueError:
        """The error of a search that was stopped before it had any plan."""
        return ValueError(
            f"method={method!r} ended {self.cut_short or 'early'}, before it had found any plan that fits in memory; let it "
            "run longer"
        )
