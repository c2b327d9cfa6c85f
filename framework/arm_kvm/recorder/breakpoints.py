"""The second mechanism: breakpoints of the gdbstub, at which the machine stops and the tables are read.

It is slow, because QEMU discards all translated code at every stop for a breakpoint, but needs only a gdbstub. It is
for a QEMU with an unknown plugin API, and to check the probe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from arm_kvm.events.trace import root_of
from arm_kvm.host.host import Host
from arm_kvm.machine.ram import Ram
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.arch.granule import KIB4
from arm_kvm.model.arch.regime import Regime
from arm_kvm.recorder.points import Point, What
from arm_kvm.recorder.raw import RawEntry, RawEvent
from arm_kvm.support.errors import LabError, MachineError

_POLL = 0.05
_ADDRESS = d.Format().address_field()
_ZERO_REGISTER = 31


class Breakpoints:
    """The mechanism. A thread handles the stops; meanwhile the lab may use ``gdb.pause()``."""

    def __init__(self, host: Host) -> None:
        self._machine = host.machine
        self._arch = host.config.architecture
        self._a64 = self._arch.name == "armv8"
        self._records: list[RawEvent | RawEntry] = []
        self._thread: threading.Thread | None = None
        self._error: LabError | None = None

    def arm(self, points: list[Point], vttbr: list[int], vtcr: list[int]) -> None:
        """Watch these points, with the machine stopped. ``vttbr``, ``vtcr``: the current values of each CPU."""
        self._points = points
        self._at = {point.va: index for index, point in enumerate(points)}
        self._vttbr, self._vtcr = list(vttbr), list(vtcr)
        self._records = []
        self._error = None
        self._tables = TableWatch(self._machine.ram, self._shape)
        for point in points:
            self._machine.gdb.insert_breakpoint(point.va)
        self._on = True
        self._thread = threading.Thread(target=self._serve, name="breakpoints", daemon=True)
        self._thread.start()

    def disarm(self) -> None:
        """Remove the breakpoints, with the machine stopped. Stops that were not handled yet are ignored."""
        self._on = False
        for point in self._points:
            self._machine.gdb.remove_breakpoint(point.va)

    @property
    def position(self) -> int:
        return len(self._records)

    def forget(self, root: int) -> None:
        self._tables.forget(root)

    def records(self, start: int = 0) -> Iterator[RawEvent | RawEntry]:
        """Return the records from position ``start`` on. Raises the error that ended the thread, if it has ended."""
        if self._error is not None:
            raise self._error
        return iter(self._records[start:])

    def _shape(self, vttbr: int, vtcr: int) -> Regime:
        """Decode the stage-2 regime of these registers. Raises MachineError for a granule other than 4 KiB."""
        features = self._arch.features(*self._machine.gdb.read(0, *self._arch.identity))
        regime = self._arch.stage2(vttbr, vtcr, 0, features)
        if regime.granule is not KIB4:
            raise MachineError("stage 2 has a granule other than 4 KiB: its tables are not followed")
        return regime

    # -- the thread -----------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        gdb = self._machine.gdb
        try:
            while self._on:
                with gdb.stopped_at_breakpoint(_POLL) as cpu:
                    if cpu is not None and self._on:
                        self._hit(cpu)
        except LabError as e:
            self._error = e

    def _hit(self, cpu: int) -> None:
        gdb = self._machine.gdb
        (pc,) = gdb.read(cpu, "pc")
        index = self._at.get(pc)
        if index is None:
            raise MachineError(f"CPU {cpu} stopped at {pc:#x}, where no breakpoint is")
        point = self._points[index]
        operand = self._operand(cpu, point)
        gdb.step(cpu)
        self._event(cpu, index, point, operand)

    def _operand(self, cpu: int, point: Point) -> int:
        if not point.registers or (self._a64 and _ZERO_REGISTER in point.registers):
            return 0
        values = self._machine.gdb.read(cpu, *(f"{'x' if self._a64 else 'r'}{n}" for n in point.registers))
        return sum(value << 32 * half for half, value in enumerate(values))

    def _event(self, cpu: int, index: int, point: Point, operand: int) -> None:
        now = time.monotonic_ns()
        if point.what is What.VTCR:
            self._vtcr[cpu] = operand
            return
        if point.what is What.VTTBR:
            self._vttbr[cpu] = operand
        if point.all_vms:
            changes = self._tables.compare_all()
        else:
            changes = self._tables.compare(self._vttbr[cpu], self._vtcr[cpu])
        self._records += [RawEntry(now, *change) for change in changes]
        self._records.append(RawEvent(now, cpu, index, operand))


Change = tuple[int, int, int, int, int]  # root, ipa, level, old, new


class TableWatch:
    """Copies of the VMs' table pages, which are compared with memory. It follows the same rules as tables.c."""

    def __init__(self, ram: Ram, shape: Callable[[int, int], Regime]) -> None:
        """``shape`` decodes the regime of a VTTBR and a VTCR."""
        self._ram = ram
        self._shape = shape
        self._roots: dict[int, Regime] = {}
        self._was: dict[tuple[int, int], NDArray[np.uint64]] = {}  # (root, table) -> its content

    def forget(self, root: int) -> None:
        self._roots.pop(root, None)
        self._was = {key: was for key, was in self._was.items() if key[0] != root}

    def compare(self, vttbr: int, vtcr: int) -> list[Change]:
        """Return the changes of the tables under this VTTBR since they were last compared."""
        root = root_of(vttbr)
        if not root:
            return []
        if root not in self._roots:
            self._roots[root] = self._shape(vttbr, vtcr)
        return self._changes(self._roots[root])

    def compare_all(self) -> list[Change]:
        """Return the changes of all VMs' tables since they were last compared."""
        return [change for regime in self._roots.values() for change in self._changes(regime)]

    def _changes(self, regime: Regime) -> list[Change]:
        return list(self._compare(regime.root, regime.root, 0, regime.start_level, regime.entries))

    def _compare(self, root: int, pa: int, ipa: int, level: int, entries: int) -> Iterator[Change]:
        new = np.frombuffer(self._ram.read(pa, entries * 8), dtype="<u8")
        was = self._was.get((root, pa))
        old = np.zeros_like(new) if was is None else was
        self._was[root, pa] = new
        for i in np.flatnonzero((old != new) | d.is_table(new, level)):
            at = ipa + (int(i) << KIB4.level_shift(level))
            before, after = int(old[i]), int(new[i])
            yield from self._entry(root, at, level, before, after)

    def _entry(self, root: int, at: int, level: int, before: int, after: int) -> Iterator[Change]:
        leads = d.is_table(after, level)
        if d.is_table(before, level) and not (leads and (before ^ after) & _ADDRESS == 0):
            yield from self._drop(root, before & _ADDRESS, at, level + 1)
        if before != after:
            yield root, at, level, before, after
        if leads:
            yield from self._compare(root, after & _ADDRESS, at, level + 1, KIB4.entries)

    def _drop(self, root: int, pa: int, ipa: int, level: int) -> Iterator[Change]:
        """Forget a table that is not reached any more. Its entries have changed to 0."""
        was = self._was.pop((root, pa), np.zeros(0, dtype=np.uint64))
        for i in np.flatnonzero(was):
            at, desc = ipa + (int(i) << KIB4.level_shift(level)), int(was[i])
            if d.is_table(desc, level):
                yield from self._drop(root, desc & _ADDRESS, at, level + 1)
            yield root, at, level, desc, 0
