"""A client of QEMU's gdbstub, through which the lab controls the CPUs.

It interrupts and continues the machine, reads and writes registers by name, writes physical memory, sets breakpoints,
and steps. The machine is stopped and continued through this connection only, never through QMP: every stop that the
gdbstub's client did not ask for sends an unsolicited packet, and a packet left in the stream shifts every later answer.

Protocol: GDB manual, appendix E (remote serial protocol); QEMU 7.2 gdbstub.c.
"""

from __future__ import annotations

import re
import select
import socket
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager

from arm_kvm.support import interrupt
from arm_kvm.support.errors import MachineError, QemuDied

_PACKET = re.compile(rb"\$([^#]*)#[0-9a-fA-F]{2}")
_CHUNK = 0xFFB


class Gdb:
    """One connection. The machine is stopped while, and only while, :attr:`stopped` is true."""

    def __init__(self, sock: socket.socket, timeout: float = 10.0) -> None:
        self._sock = sock
        self._sock.settimeout(timeout)
        self._stream = b""
        self._thread = ""
        self._registers: dict[str, tuple[int, int]] = {}
        self._lock = threading.RLock()  # between the thread that pauses and one that serves breakpoints
        self._held: set[int] = set()  # CPUs that stay stopped while the machine runs
        self.stopped = True  # QEMU stops the machine when a debugger connects
        self._send("qSupported:multiprocess+;vContSupported+")
        while not self._receive().startswith("PacketSize"):
            pass  # the stop packet of a machine that was running
        self._ask("Qqemu.PhyMemMode:1")
        self.threads = self._list_threads()

    # -- packets ---------------------------------------------------------------------------------

    def _send(self, body: str) -> None:
        raw = body.encode("latin-1")
        self._transmit(b"$%s#%02x" % (raw, sum(raw) & 0xFF))

    def _transmit(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as e:
            raise QemuDied(f"gdbstub is gone: {e}") from e

    def _receive(self) -> str:
        while not (match := _PACKET.search(self._stream)):
            try:
                more = self._sock.recv(65536)
            except TimeoutError as e:
                self._sock.close()  # a late answer would be mistaken for the next one
                raise MachineError("gdbstub did not answer in time") from e
            except OSError as e:
                raise QemuDied(f"gdbstub is gone: {e}") from e
            if not more:
                raise QemuDied("gdbstub closed the connection")
            self._stream += more
        self._stream = self._stream[match.end() :]
        self._transmit(b"+")
        return match.group(1).decode("latin-1")

    def _ask(self, body: str) -> str:
        self._send(body)
        return self._receive()

    def _list_threads(self) -> list[str]:
        threads: list[str] = []
        answer = self._ask("qfThreadInfo")
        while answer.startswith("m"):
            threads += answer[1:].split(",")
            answer = self._ask("qsThreadInfo")
        return threads

    def _annex(self, name: str) -> bytes:
        out, more = b"", True
        while more:
            answer = self._ask(f"qXfer:features:read:{name}:{len(out):x},{_CHUNK:x}")
            out += re.sub(rb"}(.)", lambda m: bytes([m[1][0] ^ 0x20]), answer[1:].encode("latin-1"))
            more = answer.startswith("m")
        return out

    # -- stop and go -----------------------------------------------------------------------------

    def interrupt(self) -> None:
        """Stop all CPUs; returns when they have stopped."""
        interrupt.check()
        if not self.stopped:
            self._transmit(b"\x03")
            self._receive()
            self.stopped = True

    def resume(self) -> None:
        """Let all CPUs run, except those that are held."""
        if self.stopped:
            going = (f";c:{thread}" for cpu, thread in enumerate(self.threads) if cpu not in self._held)
            self._send("vCont" + ("".join(going) if self._held else ";c"))
            self.stopped = False

    def hold(self, cpu: int) -> None:
        """Keep this CPU stopped when the machine is resumed. The machine must be stopped."""
        self._held.add(cpu)

    def let_go(self, cpu: int) -> None:
        """Undo :meth:`hold`."""
        self._held.discard(cpu)

    @contextmanager
    def pause(self) -> Iterator[Gdb]:
        """Stop the machine within the block, and resume it afterwards if it was running."""
        with self._lock:
            ran = not self.stopped
            self.interrupt()
            try:
                yield self
            finally:
                if ran:
                    self.resume()

    # -- breakpoints -----------------------------------------------------------------------------------

    def insert_breakpoint(self, va: int) -> None:
        """Stop the machine when a CPU is about to execute the instruction at ``va``. The machine must be stopped."""
        self._breakpoint("Z0", va)

    def remove_breakpoint(self, va: int) -> None:
        """Undo :meth:`insert_breakpoint`."""
        self._breakpoint("z0", va)

    def _breakpoint(self, packet: str, va: int) -> None:
        answer = self._ask(f"{packet},{va:x},4")
        if answer != "OK":
            raise MachineError(f"gdbstub rejects the breakpoint at {va:#x}: {answer or 'not supported'}")

    @contextmanager
    def stopped_at_breakpoint(self, timeout: float) -> Iterator[int | None]:
        """Wait for a CPU to hit a breakpoint; the machine is stopped there within the block and resumed after it.

        Yields the CPU, or None, with the machine running, when none was hit within ``timeout`` seconds. If another
        thread interrupts the machine first, the CPU hits the breakpoint again as soon as the machine is resumed.
        """
        deadline = time.monotonic() + timeout
        cpu: int | None = None
        while cpu is None and (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select([self._sock], [], [], left)
            with self._lock:  # an acknowledgement may be all there was, or another thread's pause has read the packet
                cpu = self._stop_reported() if ready and not self.stopped else None
                self.stopped |= cpu is not None
        with self._lock:
            try:
                yield cpu
            finally:
                if cpu is not None:
                    self.resume()

    def _stop_reported(self) -> int | None:
        """The CPU whose stop packet is in the stream; None if there are only acknowledgements."""
        while select.select([self._sock], [], [], 0)[0]:
            more = self._sock.recv(65536)
            if not more:
                raise QemuDied("gdbstub closed the connection")
            self._stream += more
            if _PACKET.search(self._stream):
                return self._cpu_of(self._receive())
        self._stream = self._stream.lstrip(b"+")
        return None

    def _cpu_of(self, stop: str) -> int:
        found = re.search(r"thread:([^;]+)", stop)
        return self.threads.index(found[1]) if found and found[1] in self.threads else 0

    def step(self, cpu: int) -> None:
        """Execute one instruction on ``cpu`` while the others stay stopped. The machine must be stopped."""
        self._ask(f"vCont;s:{self.threads[cpu]}")
        self._thread = ""  # QEMU has selected the thread that stopped

    # -- registers and memory; the machine must be stopped ------------------------------------------

    def _numbers(self) -> dict[str, tuple[int, int]]:
        """Register name -> (number, bits), from the target description, numbered as gdb numbers them."""
        if not self._registers:
            number = 0
            names = re.findall(rb'xi:include href="([^"]+)"', self._annex("target.xml"))
            for name in names:
                for reg in ET.fromstring(self._annex(name.decode())).iter("reg"):
                    number = int(reg.get("regnum", number))
                    self._registers[reg.get("name", "")] = (number, int(reg.get("bitsize", "0")))
                    number += 1
        return self._registers

    def has(self, register: str) -> bool:
        """Whether QEMU's target description has a register of this name."""
        return register in self._numbers()

    def read(self, cpu: int, *registers: str) -> list[int]:
        """Read the named registers of CPU number ``cpu``. Raises KeyError for a name that QEMU does not have."""
        if self._thread != self.threads[cpu]:
            self._ask(f"Hg{self.threads[cpu]}")
            self._thread = self.threads[cpu]
        values = []
        for name in registers:
            answer = self._ask(f"p{self._numbers()[name][0]:x}")
            if answer.startswith("E"):
                raise MachineError(f"gdbstub cannot read {name}: {answer}")
            values.append(int.from_bytes(bytes.fromhex(answer), "little"))
        return values

    def write(self, cpu: int, register: str, value: int) -> None:
        """Write a general register. Raises KeyError for a name that QEMU does not have."""
        self.read(cpu, register)  # selects the CPU
        number, bits = self._numbers()[register]
        answer = self._ask(f"P{number:x}={value.to_bytes(bits // 8, 'little').hex()}")
        if answer != "OK":
            raise MachineError(f"gdbstub cannot write {register}: {answer or 'not supported'}")

    def write_memory(self, pa: int, data: bytes) -> None:
        """Write the board's physical memory. QEMU invalidates code that it has translated from there."""
        answer = self._ask(f"M{pa:x},{len(data):x}:{data.hex()}")
        if answer != "OK":
            raise MachineError(f"gdbstub cannot write {len(data)} bytes at {pa:#x}: {answer or 'not supported'}")

    def close(self) -> None:
        """Detach, which resumes the machine, and disconnect."""
        if self.stopped:
            self._ask("D")
            self.stopped = False
        self._sock.close()

    def abandon(self) -> None:
        """Close the connection to a machine that is gone."""
        self._sock.close()
