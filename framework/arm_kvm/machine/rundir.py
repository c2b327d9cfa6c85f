"""The run directory: where another command of the same user finds a live machine.

Each lab process has a private folder, with a folder for each machine that holds the gdbstub's socket and a card that
describes the machine. A guardian process removes the private folder when the lab ends, ``kill -9`` included. If the
guardian is killed as well, the next lab process removes the folder; its owner holds a lock on it for as long as it
lives.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from arm_kvm.support.errors import SetupError
from arm_kvm.support.guardian import Guardian
from arm_kvm.support.limits import is_limit, lab_error


def _home() -> Path:
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or "/nonexistent")
    return (runtime if runtime.is_dir() else Path(tempfile.gettempdir())) / f"arm-kvm-{os.getuid()}"


_CLEAN_UP = 'rm -rf -- "$1"; rmdir -- "${1%/*}"'


def _new_folder(tries: int = 10) -> Path:
    home = _home()
    for _ in range(tries):
        try:
            home.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            if is_limit(e):
                raise lab_error(e, home) from e
            remedy = "set XDG_RUNTIME_DIR to a folder that you may write"
            raise SetupError(f"cannot make the folder {home}: {e.strerror}", remedy=remedy) from e
        # Another lab's guardian may be removing the empty home.
        with suppress(FileNotFoundError):
            _require_own(home)
            return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=home))
    raise SetupError(f"cannot make a folder in {home}", remedy="find out which program keeps removing it")


def _require_own(home: Path) -> None:
    """Raise SetupError if it is a symbolic link or belongs to another user."""
    status = home.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise SetupError(f"{home} is not a folder of this user", remedy="remove it, or set XDG_RUNTIME_DIR")


def _lock(folder: Path) -> int:
    """Lock the folder until the returned descriptor is closed. Raises BlockingIOError if another process holds it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _sweep() -> None:
    """Remove the folders of processes that have ended, except where a QEMU still runs, which the user should see."""
    running = {Path(card.gdb).parents[1] for card in live_machines()}
    for folder in set(_home().glob("*-*")) - running:
        owner = folder.name.partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():  # a live owner may not have locked it yet
            with suppress(OSError):
                fd = _lock(folder)
                shutil.rmtree(folder, ignore_errors=True)
                os.close(fd)


@cache
def run_directory() -> Path:
    """This process's own folder, made on first use and removed by its guardian when the process ends."""
    folder = _new_folder()
    _lock(folder)  # never released
    _sweep()
    guardian = Guardian(_CLEAN_UP, str(folder))
    atexit.register(guardian.fire)  # a clean exit returns only when the folder is gone
    return folder


@dataclass(frozen=True)
class Card:
    """What another command needs to reach a live machine."""

    host: str
    qemu_pid: int
    lab_pid: int
    ram: str  #: path in /proc of the file that holds RAM
    ram_start: int  #: offset of RAM in that file
    ram_base: int  #: physical address
    ram_size: int  #: bytes
    architecture: str
    gdb: str  #: path of the gdbstub's socket
    ssh: str  #: command line that opens a shell

    def save(self, folder: Path) -> None:
        unfinished = folder / "card.new"
        unfinished.write_text(json.dumps(asdict(self), indent=1))
        unfinished.rename(folder / "card.json")


def memory_of(card: Card) -> int:
    """Bytes of memory that its QEMU uses (Pss: its share of shared pages included); 0 when it has ended."""
    with suppress(OSError):
        rollup = Path(f"/proc/{card.qemu_pid}/smaps_rollup").read_text()
        if pss := re.search(r"^Pss: +(\d+) kB", rollup, re.M):
            return int(pss[1]) << 10
    return 0


def live_machines() -> list[Card]:
    """Cards of all machines of this user whose QEMU still runs."""
    cards = []
    for path in sorted(_home().glob("*/*/card.json")):
        with suppress(OSError, ValueError, TypeError):  # just removed, or of another version of the lab
            cards.append(Card(**json.loads(path.read_text())))
    return [card for card in cards if Path(f"/proc/{card.qemu_pid}").exists()]
