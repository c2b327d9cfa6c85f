"""A running board: QEMU's process with everything the lab holds of it.

A Machine object exists only while its QEMU was started; :meth:`Machine.check` raises as soon as it is
lost, with the evidence. QEMU ends with the lab, however the lab ends: a guardian sees to it. (Not
PR_SET_PDEATHSIG, which fires when the forking *thread* ends and wants code run between fork and exec.)
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
from typing import Protocol

from arm_kvm.machine.board import Board, Boot, command_line
from arm_kvm.machine.console import Console
from arm_kvm.machine.gdb import Gdb
from arm_kvm.machine.qmp import FAILURES, Qmp
from arm_kvm.machine.ram import OwnRam, SavedRam
from arm_kvm.machine.rundir import run_directory
from arm_kvm.machine.saved import Saved, copy
from arm_kvm.support.errors import LabError, MachineError, PortBusy, QemuDied, QemuKilled, QemuRefused, SetupError
from arm_kvm.support.guardian import Guardian, spawn
from arm_kvm.support.limits import is_limit, told

_START_TIMEOUT = 20.0
_MIGRATION_LOOK = 0.002
_DRAINED = 500  #: uses of the gdbstub after which QMP's events are read
_SAID = 40  #: lines of what QEMU says on stderr that an error shows
_DYING = 1.0  #: seconds that a process may take to die
_TERMINATED = "terminating on signal"  #: QEMU, softmmu/runstate.c qemu_kill_report (7.2)
_WHO_KILLS = "see whether this machine is short of memory (`dmesg`), or who killed it"


@dataclass(frozen=True)
class Logs:
    """Where one machine's logs go."""

    folder: Path

    def __post_init__(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            if is_limit(e):
                raise told(e, self.folder) from e
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
    """A TCG plugin for one machine: what QEMU is told of it, and the file it shares with the lab."""

    fd: int

    def argument(self, ram_fd: int) -> str: ...

    def attach(self, machine: Machine) -> None: ...

    def close(self) -> None: ...


class Machine:
    """QEMU with its RAM, console, QMP and gdbstub. Made by :meth:`start` or :meth:`restore`, ended by :meth:`kill`."""

    def __init__(self, board: Board, what: Boot | Saved, logs: Logs, ssh_port: int, plugin: Plugin | None) -> None:
        """Raises SetupError: there is no such QEMU."""
        if shutil.which(board.qemu.command[0]) is None:
            raise SetupError(f"{board.qemu.program} is not installed", remedy="run `arm-kvm setup`")
        boot, saved = (None, what) if isinstance(what, Saved) else (what, None)
        self.board = board
        self.logs = logs
        self.plugin = plugin
        self._gdb: Gdb | None = None
        self._qmp: Qmp | None = None
        self._uses = 0  # of the gdbstub
        self._ended = False
        self.folder = Path(tempfile.mkdtemp(prefix="machine-", dir=run_directory()))
        self.ram = _ram(board, saved, shared=saved is None or plugin is not None)
        console, console_end = socket.socketpair()
        qmp, qmp_end = socket.socketpair()
        self.port, port_end = socket.socketpair()  #: the lab's end of the serial port board.PORT
        ends = {"console_fd": console_end, "qmp_fd": qmp_end, "port_fd": port_end}
        fds = {"ram_fd": self.ram.file} | {name: end.fileno() for name, end in ends.items()}
        how = {"ssh_port": ssh_port, "plugin": plugin.argument(self.ram.file) if plugin else ""}
        self.argv = command_line(board, boot, **fds, gdb=self.folder / "gdb", **how)
        self.console = Console(console, logs.console)
        self.process, self._guardian = self._spawn([*fds.values(), *([plugin.fd] if plugin else [])])
        try:
            if plugin:
                plugin.attach(self)
            for end in ends.values():
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
        """Start QEMU and the board in it.

        Raises SetupError (no such QEMU), QemuRefused (it does not make this board), QemuKilled, PortBusy.
        """
        return cls(board, boot, logs, ssh_port, plugin)

    @classmethod
    def restore(cls, board: Board, saved: Saved, logs: Logs, plugin: Plugin | None = None) -> Machine:
        """Start QEMU, and let a machine of this board go on in it where it was saved. Raises what start raises."""
        return cls(board, saved, logs, 0, plugin)

    def _spawn(self, fds: list[int]) -> tuple[subprocess.Popen, Guardian]:
        with self.logs.stderr.open("wb") as stderr:
            return spawn(self.argv, str(self.folder), stdout=stderr, stderr=stderr, pass_fds=fds)

    def _attach_ram(self) -> None:
        try:
            self.ram.attach(self.process.pid)
        except (MachineError, OSError) as e:  # what /proc has of a process that dies
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
        """QEMU went away before it said hello: find out why."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        killed, code, said, evidence = self._killed, self.process.poll(), self.stderr_tail(), self.evidence()
        self.kill()
        if killed:
            return QemuKilled("QEMU was killed while it started", remedy=_WHO_KILLS, evidence=evidence)
        if code is not None and code < 0:
            crash = f"QEMU crashed while it started ({signal.Signals(-code).name})"
            return QemuDied(crash, remedy="choose another QEMU with --qemu", evidence=evidence)
        return refusal(said or str(cause), evidence)

    def qmp(self, command: str, **arguments: object) -> object:
        """Execute a QMP command and return its result. Raises MachineError, QemuDied."""
        with self._obeyed(command):
            return self._qmp(command, **arguments)

    @contextmanager
    def _obeyed(self, command: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as e:
            if self._gone():
                raise self.lost() from e
            raise MachineError(f"QMP {command}: {e}") from e

    def _forwarded_port(self) -> int:
        said = str(self.qmp("human-monitor-command", **{"command-line": "info usernet"}))
        found = re.search(r"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", said)
        if not found:
            raise MachineError(f"QEMU shows no forwarded port:\n{said}")
        return int(found[1])

    # -- saved and restored ----------------------------------------------------------------------------

    def save(self, folder: Path) -> Saved:
        """Stop the machine and write it down, for others to go on from. Raises MachineError."""
        saved = Saved.at(folder)
        self.qmp("stop")
        self._migrate("migrate", f"exec:cat > {shlex.quote(str(saved.devices))}")
        saved.write_ram(self.ram.file)
        return saved

    def _load(self, saved: Saved) -> None:
        with self._obeyed("getfd"), saved.devices_pipe() as pipe:
            self._qmp.give(pipe, "devices")
        self._migrate("migrate-incoming", "fd:devices")
        self.qmp("cont")

    def _migrate(self, command: str, uri: str) -> None:
        """Let QEMU move the state of its devices; RAM stays in its file. Raises MachineError."""
        ignore = {"capability": "x-ignore-shared", "state": True}
        self.qmp("migrate-set-capabilities", capabilities=[ignore])
        self.qmp(command, uri=uri)
        deadline = time.monotonic() + _START_TIMEOUT
        while (status := self.qmp("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise MachineError(f"QMP {command}: {status or 'nothing happens'}", evidence=self.evidence())
            time.sleep(_MIGRATION_LOOK)

    @property
    def port_open(self) -> bool:
        """Whether somebody in the host has the serial port open."""
        return any(c["label"] == "port" and c["frontend-open"] for c in self.qmp("query-chardev"))

    # -- the judge's window ---------------------------------------------------------------------------

    @property
    def gdb(self) -> Gdb:
        """The gdbstub, connected on first use (which leaves the machine running)."""
        if self._gdb is None:
            self._gdb = connect_gdb(self.folder / "gdb")
            self._gdb.resume()
        self._uses += 1
        if self._uses % _DRAINED == 0:  # each stop and each resumption is an event of QMP
            with self._obeyed("query-status"):
                self._qmp.drain()
        return self._gdb

    @contextmanager
    def patched(self, places: Iterable[int], code: bytes) -> Iterator[None]:
        """Within the block this code stands at these physical addresses, whatever was translated from there before."""
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
        """Hang up, so that another command (``arm-kvm stage2``, gdb) can have the gdbstub."""
        if self._gdb is not None:
            self._gdb.close()
            self._gdb = None

    # -- life and death ---------------------------------------------------------------------------------

    def stderr_tail(self) -> str:
        text = self.logs.stderr.read_text(errors="replace") if self.logs.stderr.exists() else ""
        return "\n".join(text.strip().splitlines()[-_SAID:])

    def evidence(self) -> str:
        """What to look at when this machine was lost: console, command line, stderr."""
        parts = ["Last console lines:\n" + (self.console.tail() or "(none)")]
        parts.append("QEMU: " + shlex.join(self.argv))
        parts.append("QEMU's stderr: " + (self.stderr_tail() or "(empty)"))
        return "\n".join(parts)

    def lost(self) -> LabError:
        """The error that says how the machine was lost; call it when the machine is known to be."""
        self.console.poll()
        if self.console.failure is not None:
            self.console.failure.evidence = self.evidence()
            return self.console.failure
        code = self.process.poll()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if self._killed:
            return QemuKilled(f"QEMU ended ({how})", remedy=_WHO_KILLS, evidence=self.evidence())
        return QemuDied(f"QEMU ended ({how})", evidence=self.evidence())

    @property
    def _killed(self) -> bool:
        """Whether a signal ended QEMU: it does not outlive SIGKILL, and obeys SIGTERM, which it tells on stderr."""
        return self.process.poll() in (-signal.SIGKILL, -signal.SIGTERM) or _TERMINATED in self.stderr_tail()

    def _gone(self) -> bool:
        """Whether QEMU has ended: a process that dies closes what it has open before it can be waited for."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_DYING)
        return self.process.poll() is not None

    @property
    def alive(self) -> bool:
        self.console.poll()
        return self.process.poll() is None and self.console.failure is None

    def check(self) -> None:
        """Raise the reason when the machine is lost: HostPanic, HostOops, HostLockup, QemuDied."""
        if not self.alive:
            raise self.lost()

    def kill(self) -> None:
        """End QEMU now. Idempotent; returns when the process is gone."""
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


#: What QEMU says on stderr where the board is not to blame; who is, and what to do.
_CAUSES: tuple[tuple[str, type[LabError], str, str], ...] = (
    (
        "Could not set up host forwarding rule",
        PortBusy,
        "the port for ssh is in use on this machine",
        "choose another --ssh-port, or none to let the system choose",
    ),
    (
        "Cannot allocate memory",
        SetupError,
        "this machine does not give QEMU the memory of the board",
        "free some, raise its limit (`ulimit -v`), or give the host file less",
    ),
    (
        "Too many open files",
        SetupError,
        "QEMU may not open as many files as it needs",
        "raise the limit of open files (`ulimit -n`)",
    ),
    (
        "could not load kernel",
        SetupError,
        "QEMU cannot read the kernel's image",
        "see whether it is still there; one of the cache is made anew by the next run",
    ),
    (
        "UNIX socket path",
        SetupError,
        "the path of the run directory is too long for a socket",
        "set XDG_RUNTIME_DIR, or TMPDIR, to a shorter one",
    ),
)


def refusal(said: str, evidence: str) -> LabError:
    """The error for a QEMU that ended before it said hello, by its own words."""
    for words, kind, message, remedy in _CAUSES:
        if words in said:
            return kind(message, remedy=remedy, evidence=evidence)
    first = next((line for line in said.splitlines() if "warning:" not in line), said)
    remedy = "correct the board in the host file"
    return QemuRefused(f"QEMU does not start this board: {first}", remedy=remedy, evidence=evidence)


def _ram(board: Board, saved: Saved | None, shared: bool) -> OwnRam | SavedRam:
    """New RAM, the saved RAM to be copied on write, or a whole copy of it for a plugin to share."""
    if not shared:
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
