"""Worker threads of the agent, beside the main thread, which answers the lab."""

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
    """A thread that does one job at a time, bound to a CPU if one is given. It is started with its first job."""

    def __init__(self, name: str, cpu: int | None = None) -> None:
        self._name, self._cpu = name, cpu
        self._jobs: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False
        self.bound = cpu is not None  #: to a CPU

    def _work(self) -> None:
        if self._cpu is not None:
            os.sched_setaffinity(0, {self._cpu})
        while (job := self._jobs.get()) is not None:
            self._results.put(job())

    def begin(self) -> threading.Thread:
        """Return the thread, which is started if it was not."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            with placement.anywhere():
                self._thread.start()
        return self._thread

    def bind(self, cpu: int) -> None:
        """Bind the thread to this CPU."""
        os.sched_setaffinity(self.begin().native_id or 0, {cpu})
        self.bound = True

    def require_idle(self) -> None:
        """Raise OSError (EBUSY) while a job is under way."""
        if self.busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self._name)

    def start(self, job: Callable[[], T]) -> None:
        """Start a job; :meth:`wait` returns its result. OSError (EBUSY) while another job is under way."""
        self.require_idle()
        self.busy = True
        self.begin()
        self._jobs.put(job)

    def wait(self, seconds: float) -> T | None:
        """Return the result of the job under way, or None if it takes longer than ``seconds``."""
        try:
            result = self._results.get(timeout=seconds)
        except queue.Empty:
            return None
        self.busy = False
        return result

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(1.0)
