"""Hold one CPU at an instruction of the kernel while the others run, which makes a race a deterministic test.

A breakpoint of the gdbstub stops the machine when a CPU is about to execute the instruction. If it is the CPU to be
held, the others are resumed without it (vCont with threads named: QEMU, gdbstub.c gdb_continue_partial, 7.2 to 11.1).
"""

from __future__ import annotations

import threading
import time

from arm_kvm.machine.gdb import Gdb
from arm_kvm.support.errors import HoldFailed, LabError

_POLL = 0.05


class Hold:
    """Holds ``cpu`` when it reaches the instruction at ``va``, and releases it after at most ``seconds``.

    Armed on construction. While the CPU is held, everything that waits for it waits too: IPIs to be acknowledged, an
    RCU grace period, any lock it holds.
    """

    def __init__(self, gdb: Gdb, va: int, cpu: int, name: str, seconds: float) -> None:
        self._gdb, self._va, self._cpu, self._name, self._seconds = gdb, va, cpu, name, seconds
        self._there, self._over = threading.Event(), threading.Event()
        self._failure: LabError | None = None
        with gdb.pause():
            gdb.insert_breakpoint(va)
        self._thread = threading.Thread(target=self._serve, name="hold", daemon=True)
        self._thread.start()

    def wait(self, seconds: float = 10.0) -> None:
        """Wait until the CPU is held. Raises HoldFailed if it does not get there within ``seconds``."""
        deadline = time.monotonic() + seconds
        while not self._there.wait(_POLL):
            self._raise_failure()
            if time.monotonic() > deadline:
                raise HoldFailed(
                    f"CPU {self._cpu} did not reach {self._name} within {seconds:.0f} s",
                    remedy="check that what it runs calls that function on this kernel",
                )

    @property
    def reached(self) -> bool:
        """Whether the CPU has reached the instruction."""
        return self._there.is_set()

    def release(self) -> None:
        """Let the CPU run on. Raises HoldFailed if it was released before because its time had run out."""
        self._over.set()
        self._thread.join()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- the thread ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._await_cpu()
            if self._there.is_set() and not self._over.wait(self._seconds):
                self._failure = HoldFailed(
                    f"CPU {self._cpu} was held at {self._name} for {self._seconds:.0f} s and had to be let go",
                    remedy="check whether what the test does meanwhile waits for this CPU",
                )
            with self._gdb.pause():
                if self._there.is_set():
                    self._gdb.let_go(self._cpu)
                else:
                    self._gdb.remove_breakpoint(self._va)
        except LabError as e:
            self._failure = e

    def _await_cpu(self) -> None:
        while not self._over.is_set() and not self._there.is_set():
            with self._gdb.stopped_at_breakpoint(_POLL) as cpu:
                if cpu is not None:
                    self._stopped(cpu)

    def _stopped(self, cpu: int) -> None:
        self._gdb.remove_breakpoint(self._va)
        if cpu == self._cpu:
            self._gdb.hold(cpu)
            self._there.set()
            return
        self._gdb.step(cpu)  # another CPU passes by
        self._gdb.insert_breakpoint(self._va)
