"""The lab's side of the probe: load it into QEMU, arm it, and read its log from shared memory.

A probe that is loaded slows down the boot even while it is not armed, because QEMU calls it for every block that it
translates. So a host has it only when a test needs it. The log is not a ring: it fills once, and no CPU waits for the
lab to read it.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from arm_kvm.host.config import HostConfig
from arm_kvm.machine.machine import Machine
from arm_kvm.recorder import library
from arm_kvm.recorder.points import INSN, Point, What
from arm_kvm.recorder.raw import RawEntry, RawEvent
from arm_kvm.support.errors import MachineError

# -- shared memory: probe.h has the same layout ----------------------------------------------------------------------

_MAX_POINTS, _MAX_CPUS, _MAX_FORGET = 64, 16, 1 << 17
_PLAIN, _VTTBR, _VTCR, _ALL_VMS = range(4)
_NONE = 0xFFFF_FFFF
_POINT = np.dtype([("vaddr", "<u8"), ("kind", "<u4"), ("begins_block", "<u4"), ("reg", "<u4", 2)])
_RECORD = np.dtype(
    [("ns", "<u8"), ("entry", "u1"), ("cpu", "u1"), ("point", "u1"), ("level", "u1"), ("written", "<u4")]
    + [(name, "<u8") for name in "abcd"]
)
_NUMBERS = ["epoch", "armed", "points", "capacity", "armv7"]
_NUMBERS += ["ram_base", "ram_size", "head", "mismatch", "granules", "forgets"]
_CONTROL = np.dtype(
    [(name, "<u8") for name in _NUMBERS]
    + [
        ("vttbr", "<u8", _MAX_CPUS),
        ("vtcr", "<u8", _MAX_CPUS),
        ("point", _POINT, _MAX_POINTS),
        ("forget", "<u8", _MAX_FORGET),
    ]
)
#: Records of one recording, 48 bytes each. The memory is allocated as they are written.
_CAPACITY = 6_000_000
_EPOCH = 0xFFFF_FFFF

_A64_ZERO = 31


class Probe:
    """The probe of one machine, created before the machine and closed with it."""

    def __init__(self, config: HostConfig) -> None:
        """Prepare the probe for a machine of this host. Raises NoProbe, SetupError, DiskFull."""
        self._library = library.obtain(config.board.qemu)
        self._armv7 = config.architecture.name == "armv7"
        size = _CONTROL.itemsize + _CAPACITY * _RECORD.itemsize
        self.fd = os.memfd_create("arm-kvm-probe", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._control = np.frombuffer(self._map, dtype=_CONTROL, count=1)
        self._log = np.frombuffer(self._map, dtype=_RECORD, offset=_CONTROL.itemsize)

    def argument(self, ram_fd: int) -> str:
        """Return QEMU's ``-plugin`` argument."""
        return f"{str(self._library).replace(',', ',,')},control=/proc/self/fd/{self.fd},ram=/proc/self/fd/{ram_fd}"

    def close(self) -> None:
        """Unmap and close the shared memory."""
        del self._control, self._log
        self._map.close()
        os.close(self.fd)

    # -- numbers of the control block ---------------------------------------------------------------------------

    def _set(self, **numbers: int) -> None:
        for name, value in numbers.items():
            self._control[name][0] = value

    def _get(self, name: str) -> int:
        return int(self._control[name][0])

    @property
    def position(self) -> int:
        """The number of records so far, which is the index of the next one."""
        return self._get("head")

    def forget(self, root: int) -> None:
        """Stop comparing the tables under this root: the VM is destroyed. Raises MachineError for too many VMs."""
        count = self._get("forgets")
        if count == _MAX_FORGET:
            raise MachineError(f"more than {_MAX_FORGET:,} VMs were destroyed", remedy="record for a shorter time")
        self._control["forget"][0][count] = root
        self._set(forgets=count + 1)

    # -- on and off, with the machine stopped -----------------------------------------------------------------------

    def attach(self, machine: Machine) -> None:
        """Set the machine that was started with this probe."""
        self._machine = machine

    def arm(self, points: list[Point], vttbr: list[int], vtcr: list[int]) -> None:
        """Watch these points. ``vttbr``, ``vtcr``: the current values of each CPU. Raises MachineError for too many."""
        if len(points) > _MAX_POINTS or len(vttbr) > _MAX_CPUS:
            raise MachineError(f"{len(points)} instructions on {len(vttbr)} CPUs are more than the probe can watch")
        machine, self._points = self._machine, points
        for i, point in enumerate(points):
            self._control["point"][0][i] = self._encode(point)
        self._control["vttbr"][0][: len(vttbr)] = vttbr
        self._control["vtcr"][0][: len(vtcr)] = vtcr
        self._set(
            epoch=self._get("epoch") + 1,
            points=len(points),
            capacity=_CAPACITY,
            armv7=self._armv7,
            ram_base=machine.ram.base,
            ram_size=machine.ram.size,
            head=0,
            mismatch=0,
            granules=0,
            forgets=0,
        )
        self._set(armed=1)
        self._retranslate()

    def _encode(self, point: Point) -> tuple[int, int, bool, list[int]]:
        """Encode the point as a _POINT."""
        kind = {What.VTTBR: _VTTBR, What.VTCR: _VTCR}.get(point.what, _PLAIN)
        if point.all_vms:
            kind = _ALL_VMS
        zero = not self._armv7 and _A64_ZERO in point.registers
        registers = [] if zero else list(point.registers)
        return point.va, kind, point.what is What.ENTER, (registers + [_NONE] * 2)[:2]

    def disarm(self) -> None:
        """Stop watching."""
        self._set(armed=0, points=0)
        self._retranslate()

    def _retranslate(self) -> None:
        """Make QEMU translate the code at the points again, by writing it to memory unchanged."""
        for pa in sorted({pa for point in self._points for pa in (point.pa, point.pa + INSN)}):
            self._machine.gdb.write_memory(pa, self._machine.ram.read(pa, INSN))

    # -- the log ------------------------------------------------------------------------------------------------------

    def records(self, start: int = 0) -> Iterator[RawEvent | RawEntry]:
        """Return the records from position ``start`` on, in order. Raises MachineError when the log is not complete."""
        if mismatch := self._get("mismatch"):
            raise MachineError(
                f"{mismatch} times the probe did not find an operand where this QEMU should keep it",
                remedy="choose another QEMU with --qemu, deb:SUITE for example",
            )
        if self._get("granules"):
            raise MachineError("stage 2 has a granule other than 4 KiB: the probe does not follow its tables")
        if self.position > _CAPACITY:
            raise MachineError(f"more than {_CAPACITY:,} events: the rest is lost", remedy="record for a shorter time")
        for r in self._whole(start).tolist():
            ns, is_entry, cpu, point, level, _, a, b, c, d = r
            yield RawEntry(ns, a, b, level, c, d) if is_entry else RawEvent(ns, cpu, point, a)

    def _whole(self, start: int) -> NDArray[np.void]:
        """Wait until the CPUs have finished writing their records, and return those from ``start`` on."""
        log = self._log[start : self.position]
        deadline = time.monotonic() + 1.0
        while len(log) and (log["written"] != self._get("epoch") & _EPOCH).any():
            if time.monotonic() > deadline:
                raise MachineError("the probe's log has holes")
            time.sleep(0.001)
        return log
