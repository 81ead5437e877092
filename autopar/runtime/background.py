"""Saving while training goes on: a thread with a process group of its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch.distributed as dist


class Saving:
    """One checkpoint on its way to the disk; what `autopar.save` returns.

    group: a gloo group of all ranks for the writing thread, made once per run; collectives of two threads must not share
    a group. None as long as nothing was saved in the background.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is under way any more, written or failed."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> None:
        """Return when the checkpoint is complete under its name; raise, once, what kept it from being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def follow_up(self, write: Callable[[], None], name: str, background: bool) -> Saving:
        """The next saving: run `write()`, here or in a thread. All ranks call it together."""
        following = Saving(self.group)
        if not background:
            write()
            return following
        if following.group is None:
            following.group = self.group = dist.new_group(backend="gloo")

        def run() -> None:
            try:
                write()
            except BaseException as error:
                following._error = error
                warnings.warn(f"the checkpoint {name} was not written: {error}", stacklevel=1)

        # Not a daemon: a program that ends right after the last save must still have it.
        following._thread = threading.Thread(target=run, name="autopar-save")
        following._thread.start()
        return following
