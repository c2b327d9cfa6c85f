"""The probe as the lab holds it: compiled, loaded into QEMU, told what to watch, and read.

Costs: loaded but not armed, QEMU asks it about every block it translates (a slower boot); not loaded, nothing. So a
host has it only when a test wants it. The log is shared memory that fills from the start; nothing waits for the lab.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from framework import cache
from framework.errors import MachineError, SetupError
from framework.machine import version
from framework.machine.machine import Machine

from .points import INSN, Point, What
from .raw import RawEntry, RawEvent

_SOURCE = Path(__file__).with_name("probe.c")
_NEWEST_MAJOR = 8  #: QEMU 9 has another plugin API, and another way to read registers

# -- shared memory: the same in probe.c ----------------------------------------------------------------------------

_MAX_POINTS, _MAX_CPUS, _MAX_FORGET = 64, 16, 1 << 17
_PLAIN, _VTTBR, _VTCR, _ALL_VMS = range(4)
_HERE, _AFTER, _BLOCK = range(3)
_NOWHERE = 0xFFFF_FFFF
_POINT = np.dtype(
    [("vaddr", "<u8"), ("kind", "<u4"), ("when", "<u4"), ("offset", "<u4", 2), ("width", "<u4"), ("pad", "<u4")]
)
_RECORD = np.dtype(
    [("ns", "<u8"), ("entry", "u1"), ("cpu", "u1"), ("point", "u1"), ("level", "u1"), ("written", "<u4")]
    + [(name, "<u8") for name in "abcd"]
)
_NUMBERS = ["epoch", "armed", "points", "capacity", "pc_offset", "pc_width"]
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
#: Records of one recording, 48 bytes each: memory is used as they are written.
_CAPACITY = 6_000_000
_EPOCH = 0xFFFF_FFFF

# -- QEMU's CPU state, target/arm/cpu.h (CPUARMState): regs[16] u32, xregs[32] u64, pc u64 -----------------------------

_A32_PC, _A64_PC = 15 * 4, 64 + 32 * 8
_A64_ZERO = 31


def _compile(out: Path, work: Path) -> dict:
    if shutil.which("gcc") is None:
        raise SetupError("gcc is not installed: the recorder's probe cannot be compiled", remedy="run `arm-kvm setup`")
    argv = ["gcc", "-O2", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(out / "probe.so"), str(_SOURCE)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise SetupError("gcc does not compile the recorder's probe", evidence=done.stderr)
    return {"source": _SOURCE.name}


class Probe:
    """One machine's probe. Made before the machine, given to it, closed with it."""

    def __init__(self, qemu: str) -> None:
        """Raises SetupError: no compiler, or a QEMU whose plugin API is another."""
        said = version.of(qemu)
        major = re.search(r"(\d+)\.", said)
        if major is None or int(major[1]) > _NEWEST_MAJOR:
            raise SetupError(
                f"the recorder's probe knows the plugins of QEMU up to {_NEWEST_MAJOR}, this is {said}",
                remedy="record through the gdbstub: --recorder breakpoints",
            )
        entry = cache.obtain("probe", cache.key_of(_SOURCE.read_bytes()), _compile)
        self._library = entry.folder / "probe.so"
        size = _CONTROL.itemsize + _CAPACITY * _RECORD.itemsize
        self.fd = os.memfd_create("arm-kvm-probe", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self._control = np.frombuffer(self._map, dtype=_CONTROL, count=1)
        self._log = np.frombuffer(self._map, dtype=_RECORD, offset=_CONTROL.itemsize)

    def argument(self, ram_fd: int) -> str:
        """QEMU's ``-plugin`` argument."""
        return f"{self._library},control=/proc/self/fd/{self.fd},ram=/proc/self/fd/{ram_fd}"

    def close(self) -> None:
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
        """Records so far: what comes later in the trace has a number of at least this."""
        return self._get("head")

    def forget(self, root: int) -> None:
        """The VM with this root is destroyed: what lies there now is none of its tables."""
        count = self._get("forgets")
        if count == _MAX_FORGET:
            raise MachineError(f"more than {_MAX_FORGET:,} VMs were destroyed", remedy="record for a shorter time")
        self._control["forget"][0][count] = root
        self._set(forgets=count + 1)

    # -- on and off, with the machine stopped -----------------------------------------------------------------------

    def attach(self, machine: Machine) -> None:
        """The machine that was started with this probe."""
        self._machine = machine

    def arm(self, points: list[Point], vttbr: list[int], vtcr: list[int]) -> None:
        """Watch these points. ``vttbr``, ``vtcr``: of each CPU now."""
        if len(points) > _MAX_POINTS or len(vttbr) > _MAX_CPUS:
            raise MachineError(f"{len(points)} instructions on {len(vttbr)} CPUs are more than the probe can watch")
        machine, self._points = self._machine, points
        a64 = machine.board.qemu.endswith("aarch64")
        for i, point in enumerate(points):
            self._control["point"][0][i] = _encode(point, a64)
        self._control["vttbr"][0][: len(vttbr)] = vttbr
        self._control["vtcr"][0][: len(vtcr)] = vtcr
        self._set(
            epoch=self._get("epoch") + 1,
            points=len(points),
            capacity=_CAPACITY,
            pc_offset=_A64_PC if a64 else _A32_PC,
            pc_width=8 if a64 else 4,
            ram_base=machine.ram.base,
            ram_size=machine.ram.size,
            head=0,
            mismatch=0,
            granules=0,
            forgets=0,
        )
        self._set(armed=1)
        self._retranslate()

    def disarm(self) -> None:
        self._set(armed=0, points=0)
        self._retranslate()

    def _retranslate(self) -> None:
        """Have QEMU translate the code at the points anew: it does for code that is written, be it the same."""
        for pa in sorted({pa for point in self._points for pa in (point.pa, point.pa + INSN)}):
            self._machine.gdb.write_memory(pa, self._machine.ram.read(pa, INSN))

    # -- the log ------------------------------------------------------------------------------------------------------

    def records(self, start: int = 0) -> Iterator[RawEvent | RawEntry]:
        """What was logged, in order, from a position on. Raises MachineError when the log is not whole."""
        if mismatch := self._get("mismatch"):
            raise MachineError(
                f"the probe did not find the guest's pc in QEMU's CPU state, {mismatch} times: its layout is another",
                remedy="record through the gdbstub: --recorder breakpoints",
            )
        if self._get("granules"):
            raise MachineError("stage 2 has a granule other than 4 KiB: the probe does not follow its tables")
        if self.position > _CAPACITY:
            raise MachineError(f"more than {_CAPACITY:,} events: the rest is lost", remedy="record for a shorter time")
        for r in self._whole(start).tolist():
            ns, is_entry, cpu, point, level, _, a, b, c, d = r
            yield RawEntry(ns, a, b, level, c, d) if is_entry else RawEvent(ns, cpu, point, a)

    def _whole(self, start: int) -> np.ndarray:
        """The records, once the CPUs have finished writing the last."""
        log = self._log[start : self.position]
        deadline = time.monotonic() + 1.0
        while len(log) and (log["written"] != self._get("epoch") & _EPOCH).any():
            if time.monotonic() > deadline:
                raise MachineError("the probe's log has holes")
            time.sleep(0.001)
        return log


def _encode(point: Point, a64: bool) -> tuple:
    kind = {What.VTTBR: _VTTBR, What.VTCR: _VTCR}.get(point.what, _PLAIN)
    if point.all_vms:
        kind = _ALL_VMS
    when = _BLOCK if point.what is What.ENTER else _AFTER if point.registers else _HERE
    at = [64 + 8 * r if a64 else 4 * r for r in point.registers]
    if a64 and _A64_ZERO in point.registers:
        at = []
    return point.va, kind, when, (at + [_NOWHERE] * 2)[:2], 8 if a64 else 4, 0
