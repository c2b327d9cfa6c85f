"""Threads that wait for work, beside the one that answers the lab."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from . import placement

T = TypeVar("T")


class Worker(Generic[T]):
    """A thread that waits for work, bound to a CPU if one is given. It begins with its first work."""

    def __init__(self, name: str, cpu: int | None = None) -> None:
        self._name, self._cpu = name, cpu
        self._orders: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False
        self.bound = cpu is not None  #: to a CPU

    def _work(self) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})
        while (order := self._orders.get()) is not None:
            self._results.put(order())

    def begin(self) -> threading.Thread:
        """The thread, begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            with placement.anywhere():
                self._thread.start()
        return self._thread

    def bind(self, cpu: int) -> None:
        """From now on on this CPU only."""
        os.sched_setaffinity(self.begin().native_id or 0, {cpu})
        self.bound = True

    def require_idle(self) -> None:
        """OSError (EBUSY) while work is under way."""
        if self.busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self._name)

    def start(self, order: Callable[[], T]) -> None:
        """Do this; :meth:`wait` takes what comes of it. OSError (EBUSY) while other work is under way."""
        self.require_idle()
        self.busy = True
        self.begin()
        self._orders.put(order)

    def wait(self, seconds: float) -> T | None:
        """The result of the work under way, or None when it has not come in time."""
        try:
            result = self._results.get(timeout=seconds)
        except queue.Empty:
            return None
        self.busy = False
        return result

    def close(self) -> None:
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(1.0)
