"""A running board: QEMU's process and the lab's connections to it.

A Machine is only made together with its QEMU process; :meth:`Machine.check` raises once the machine is lost, with the
evidence. A guardian ends QEMU when the lab ends, however it ends. (Not PR_SET_PDEATHSIG, which fires when the forking
*thread* ends and needs code between fork and exec.)
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from arm_kvm.machine.board import Board, Boot, Descriptors, command_line
from arm_kvm.machine.console import Console
from arm_kvm.machine.gdb import Gdb
from arm_kvm.machine.qmp import FAILURES, Qmp
from arm_kvm.machine.ram import OwnRam, SavedRam
from arm_kvm.machine.refusals import refusal
from arm_kvm.machine.rundir import run_directory
from arm_kvm.machine.saved import Saved, copy
from arm_kvm.support.errors import LabError, MachineError, QemuDied, QemuKilled, SetupError
from arm_kvm.support.guardian import Guardian, spawn
from arm_kvm.support.limits import is_limit, lab_error

_START_TIMEOUT = 20.0
_MIGRATION_POLL = 0.002
_DRAIN_EVERY = 500  #: uses of the gdbstub, after which QMP's events are drained
_STDERR_LINES = 40  #: of QEMU's stderr that an error shows
_DYING = 1.0  #: seconds that a process may take to die
_TERMINATED = "terminating on signal"  #: QEMU, softmmu/runstate.c qemu_kill_report (7.2)
_KILLED_REMEDY = "see whether this machine is short of memory (`dmesg`), or what killed QEMU"


@dataclass(frozen=True)
class Logs:
    """The log files of one machine. Constructing it makes the folder, and raises SetupError if that fails."""

    folder: Path

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            if is_limit(e):
                raise lab_error(e, self.folder) from e
            remedy = "choose another folder with --artifacts DIR"
            raise SetupError(f"cannot keep logs in {self.folder}: {e.strerror}", remedy=remedy) from e

    @property
    def console(self) -> Path:
        return self.folder / "console.log"

    @property
    def qmp(self) -> Path:
        return self.folder / "qmp.log"

    @property
    def agent(self) -> Path:
        return self.folder / "agent.log"

    @property
    def stderr(self) -> Path:
        return self.folder / "qemu-stderr.log"

    def all(self) -> tuple[Path, ...]:
        return (self.console, self.qmp, self.agent, self.stderr)


class Plugin(Protocol):
    """A TCG plugin for one machine."""

    fd: int  #: the file that it shares with the lab, inherited by QEMU

    def argument(self, ram_fd: int) -> str:
        """The value of QEMU's ``-plugin``."""
        ...

    def attach(self, machine: Machine) -> None:
        """Connect to the plugin in the QEMU that has just been started."""
        ...

    def close(self) -> None: ...


class Machine:
    """QEMU with its RAM, console, QMP and gdbstub. Made by :meth:`start` or :meth:`restore`, ended by :meth:`kill`."""

    def __init__(self, board: Board, what: Boot | Saved, logs: Logs, ssh_port: int, plugin: Plugin | None) -> None:
        if shutil.which(board.qemu.command[0]) is None:
            raise SetupError(f"{board.qemu.program} is not installed", remedy="run `arm-kvm setup`")
        boot, saved = (None, what) if isinstance(what, Saved) else (what, None)
        self.board = board
        self.logs = logs
        self.plugin = plugin
        self._gdb: Gdb | None = None
        self._qmp: Qmp | None = None
        self._gdb_uses = 0
        self._ended = False
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=run_directory()))
        self.ram = _ram(board, saved, shared=saved is None or plugin is not None)
        console, console_end = socket.socketpair()
        qmp, qmp_end = socket.socketpair()
        self.port, port_end = socket.socketpair()  #: the lab's end of the serial port board.PORT
        ends = (console_end, qmp_end, port_end)
        fds = (self.ram.file, *(end.fileno() for end in ends))
        argument = plugin.argument(self.ram.file) if plugin else ""
        gdb = self.folder / "gdb"
        self.argv = command_line(board, boot, Descriptors(*fds), gdb=gdb, ssh_port=ssh_port, plugin=argument)
        self.console = Console(console, logs.console)
        self.process, self._guardian = self._spawn([*fds, *([plugin.fd] if plugin else [])])
        try:
            if plugin:
                plugin.attach(self)
            for end in ends:
                end.close()
            self._qmp = self._connect_qmp(qmp)
            self.ssh_port = self._forwarded_port()
            self._attach_ram()
            if saved:
                self._load(saved)
        except BaseException:
            self.kill()
            raise

    @classmethod
    def start(cls, board: Board, boot: Boot, logs: Logs, ssh_port: int = 0, plugin: Plugin | None = None) -> Machine:
        """Start QEMU and boot the board.

        Raises SetupError (no such QEMU), QemuRefused (it does not have this board), QemuKilled, PortBusy.
        """
        return cls(board, boot, logs, ssh_port, plugin)

    @classmethod
    def restore(cls, board: Board, saved: Saved, logs: Logs, plugin: Plugin | None = None) -> Machine:
        """Start QEMU and resume a machine of this board where it was saved. Raises what :meth:`start` raises."""
        return cls(board, saved, logs, 0, plugin)

    def _spawn(self, fds: list[int]) -> tuple[subprocess.Popen[bytes], Guardian]:
        with self.logs.stderr.open("wb") as stderr:
            return spawn(self.argv, str(self.folder), stdout=stderr, stderr=stderr, pass_fds=fds)

    def _attach_ram(self) -> None:
        try:
            self.ram.attach(self.process.pid)
        except (MachineError, OSError) as e:  # /proc of a process that is dying
            if self._gone():
                raise self.lost() from e
            raise

    # -- QMP -------------------------------------------------------------------------------------

    def _connect_qmp(self, sock: socket.socket) -> Qmp:
        try:
            return Qmp(sock, self.folder.name, self.logs.qmp, _START_TIMEOUT)
        except FAILURES as e:
            raise self._refusal(e) from e

    def _refusal(self, cause: Exception) -> LabError:
        """The error for a QEMU that exited before its QMP greeting."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        killed, code, stderr, evidence = self._killed, self.process.poll(), self.stderr_tail(), self.evidence()
        self.kill()
        if killed:
            return QemuKilled("QEMU was killed while it started", remedy=_KILLED_REMEDY, evidence=evidence)
        if code is not None and code < 0:
            crash = f"QEMU crashed while it started ({signal.Signals(-code).name})"
            return QemuDied(crash, remedy="choose another QEMU with --qemu", evidence=evidence)
        return refusal(stderr or str(cause), evidence)

    def qmp(self, command: str, **arguments: object) -> Any:
        """Execute a QMP command and return its result, decoded JSON. Raises MachineError, QemuDied."""
        with self._connected(command) as qmp:
            return qmp(command, **arguments)

    @contextmanager
    def _connected(self, command: str) -> Iterator[Qmp]:
        """The QMP connection; its failures are raised as errors of the lab that name ``command``."""
        assert self._qmp is not None, "connected by __init__"
        try:
            yield self._qmp
        except FAILURES as e:
            if self._gone():
                raise self.lost() from e
            raise MachineError(f"QMP {command}: {e}") from e

    def _forwarded_port(self) -> int:
        shown = str(self.qmp("human-monitor-command", **{"command-line": "info usernet"}))
        found = re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", shown)
        if not found:
            raise MachineError(f"QEMU shows no forwarded port:\n{shown}")
        return int(found[1])

    # -- saved and restored ----------------------------------------------------------------------------

    def save(self, folder: Path) -> Saved:
        """Stop the machine and save its RAM and devices in ``folder``. Raises MachineError."""
        saved = Saved.at(folder)
        self.qmp("stop")
        self._migrate("migrate", f"exec:cat > {shlex.quote(str(saved.devices))}")
        saved.write_ram(self.ram.file)
        return saved

    def _load(self, saved: Saved) -> None:
        with self._connected("getfd") as qmp, saved.devices_pipe() as pipe:
            qmp.give(pipe, "devices")
        self._migrate("migrate-incoming", "fd:devices")
        self.qmp("cont")

    def _migrate(self, command: str, uri: str) -> None:
        """Have QEMU save or load its devices' state; RAM stays in its file. Raises MachineError."""
        ignore = {"capability": "x-ignore-shared", "state": True}
        self.qmp("migrate-set-capabilities", capabilities=[ignore])
        self.qmp(command, uri=uri)
        deadline = time.monotonic() + _START_TIMEOUT
        while (status := self.qmp("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise MachineError(f"QMP {command}: {status or 'no progress'}", evidence=self.evidence())
            time.sleep(_MIGRATION_POLL)

    @property
    def port_open(self) -> bool:
        """Whether a process in the host has the serial port open."""
        return any(c["label"] == "port" and c["frontend-open"] for c in self.qmp("query-chardev"))

    # -- the gdbstub ----------------------------------------------------------------------------------

    @property
    def gdb(self) -> Gdb:
        """The gdbstub, connected on first use; connecting leaves the machine running."""
        if self._gdb is None:
            self._gdb = connect_gdb(self.folder / "gdb")
            self._gdb.resume()
        self._gdb_uses += 1
        if self._gdb_uses % _DRAIN_EVERY == 0:  # every stop and every resumption queues a QMP event
            with self._connected("query-status") as qmp:
                qmp.drain()
        return self._gdb

    @contextmanager
    def patched(self, places: Iterable[int], code: bytes) -> Iterator[None]:
        """Within the block, replace the instructions at these physical addresses by ``code``."""
        saved = {pa: self.ram.read(pa, len(code)) for pa in places}
        with self.gdb.pause() as gdb:
            for pa in saved:
                gdb.write_memory(pa, code)
        try:
            yield
        finally:
            with self.gdb.pause() as gdb:
                for pa, old in saved.items():
                    gdb.write_memory(pa, old)

    def release_gdb(self) -> None:
        """Disconnect, so that another command (``arm-kvm stage2``, gdb) can use the gdbstub."""
        if self._gdb is not None:
            self._gdb.close()
            self._gdb = None

    # -- life and death ---------------------------------------------------------------------------------

    def stderr_tail(self) -> str:
        """The last lines of QEMU's stderr."""
        text = self.logs.stderr.read_text(errors="replace") if self.logs.stderr.exists() else ""
        return "\n".join(text.strip().splitlines()[-_STDERR_LINES:])

    def evidence(self) -> str:
        """What to look at when this machine is lost: console, command line, stderr."""
        parts = ["Last console lines:\n" + (self.console.tail() or "(none)")]
        parts.append("QEMU: " + shlex.join(self.argv))
        parts.append("QEMU's stderr: " + (self.stderr_tail() or "(empty)"))
        return "\n".join(parts)

    def lost(self) -> LabError:
        """Return the error that says how the machine was lost. Call it only when the machine is known to be lost."""
        self.console.poll()
        if self.console.failure is not None:
            self.console.failure.evidence = self.evidence()
            return self.console.failure
        code = self.process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if self._killed:
            return QemuKilled(f"QEMU ended ({how})", remedy=_KILLED_REMEDY, evidence=self.evidence())
        return QemuDied(f"QEMU ended ({how})", evidence=self.evidence())

    @property
    def _killed(self) -> bool:
        """Whether SIGKILL or SIGTERM ended QEMU; it exits cleanly on SIGTERM and reports it on stderr."""
        return self.process.poll() in (-signal.SIGKILL, -signal.SIGTERM) or _TERMINATED in self.stderr_tail()

    def _gone(self) -> bool:
        """Whether QEMU has ended. Waits a moment, for a dying process closes its files before it can be reaped."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_DYING)
        return self.process.poll() is not None

    @property
    def alive(self) -> bool:
        """Whether QEMU runs and the console shows no fatal error."""
        self.console.poll()
        return self.process.poll() is None and self.console.failure is None

    def check(self) -> None:
        """Raise HostPanic, HostOops, HostLockup or QemuDied if the machine is lost."""
        if not self.alive:
            raise self.lost()

    def kill(self) -> None:
        """End QEMU and wait until the process is gone. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._guardian.fire()
        self.process.wait()
        self.console.poll()
        self.console.close()
        self.port.close()
        if self._gdb is not None:
            self._gdb.abandon()
            self._gdb = None
        if self._qmp is not None:
            self._qmp.close()
        self.ram.close()
        if self.plugin:
            self.plugin.close()


def _ram(board: Board, saved: Saved | None, shared: bool) -> OwnRam | SavedRam:
    """New RAM; or saved RAM, mapped copy-on-write or, if it is to be ``shared`` with a plugin, copied as a whole."""
    if saved and not shared:
        return SavedRam(os.open(saved.ram, os.O_RDWR | os.O_CLOEXEC), board.ram_base, board.memory)
    ram = OwnRam.create(board.ram_base, board.memory)
    if saved:
        with saved.ram.open("rb") as f:
            copy(f.fileno(), ram.file)
    return ram


def connect_gdb(path: Path, timeout: float = 10.0) -> Gdb:
    """Connect to a machine's gdbstub; the machine is stopped when this returns. Raises MachineError."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock.connect(str(path))
            return Gdb(sock, timeout)
        except (FileNotFoundError, ConnectionRefusedError) as e:
            if time.monotonic() > deadline:
                raise MachineError(f"no gdbstub at {path}: {e}") from e
            time.sleep(0.01)
