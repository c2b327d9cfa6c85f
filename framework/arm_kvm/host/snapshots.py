"""Snapshots: each kind of host is booted once, saved with its agent ready, and restored any number of times.

A snapshot is cached under a key of everything that went into it; one that does not match its checksums is made anew.
The least recently used are removed when all of them exceed the budget of disk space.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from arm_kvm.host import rootfs
from arm_kvm.host.config import HostConfig
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import Kernel
from arm_kvm.host.origin import Origin
from arm_kvm.machine.board import Boot, Descriptors, command_line
from arm_kvm.machine.machine import Plugin
from arm_kvm.machine.saved import Saved
from arm_kvm.support import cache
from arm_kvm.support.errors import MachineError
from arm_kvm.support.limits import lab_errors
from arm_kvm.support.progress import note

KIND = "snapshots"
#: Bytes of disk for all snapshots; one uses 70 to 130 MB.
BUDGET = 3 << 30
_FORMAT = 1  #: raise it when what a host does before it is saved changes


@dataclass
class Snapshot:
    """A host of this kind as it was when its agent first answered."""

    config: HostConfig
    kernel: Kernel
    saved: Saved
    origin: Origin = field(default_factory=Origin)  #: of all hosts restored from it

    def restore(self, logs: Path, plugin: Plugin | None = None, entropy: bytes = b"") -> Host:
        """Restore a fresh host; see :meth:`arm_kvm.host.host.Host.restore`."""
        return Host.restore(
            self.config, self.kernel, self.saved, logs, plugin=plugin, entropy=entropy, origin=self.origin
        )


def obtain(config: HostConfig, kernel: Kernel, logs: Path) -> Snapshot:
    """Return the snapshot of this kind of host; make it if it is missing or damaged.

    Raises what :meth:`Host.boot` raises, MachineError (QEMU cannot save the machine), DiskFull.
    """
    key = key_of(config, kernel)
    held = _held(key)
    if held is None:
        cache.obtain(KIND, key, lambda out, work: _make(config, kernel, logs, out), sized=False)  # it has checksums
        held = _held(key)
    if held is None:
        raise MachineError(
            f"the snapshot of {config.name} is damaged as soon as it is saved", remedy="check the cache's disk"
        )
    return Snapshot(config, kernel, held)


def forget(snapshot: Snapshot) -> None:
    """Remove a snapshot that does not restore, unless another process has already replaced it."""
    entry = cache.lookup(KIND, key_of(snapshot.config, snapshot.kernel))
    with suppress(FileNotFoundError):  # just removed
        if entry and os.path.samefile(Saved.at(entry.folder).ram, snapshot.saved.ram):
            cache.remove(entry)


def key_of(config: HostConfig, kernel: Kernel) -> str:
    """The cache key: of QEMU, board, kernel, root file system, command line and agent."""
    boot, fds = Boot(Path("kernel"), Path("initramfs"), config.cmdline), Descriptors(0, 0, 0, 0)
    board = command_line(config.board, boot, fds, gdb=Path("gdb"), ssh_port=0)
    qemu = config.board.qemu
    files = rootfs.obtain(config.rootfs)
    modules = [part for name, data in kernel.modules for part in (name, data)]
    return cache.key_of(
        _FORMAT,
        *qemu.identity,
        board[len(qemu.command) :],
        kernel.image.read_bytes(),
        *modules,
        files.overlay_key,
        files.host_key,  # new whenever the root file system is made anew
    )


def _make(config: HostConfig, kernel: Kernel, logs: Path, out: Path) -> cache.Meta:
    host = Host.boot(config, kernel, logs)
    try:
        saved = host.machine.save(out)
        return {"host": config.name, "kernel": kernel.name, "release": host.release} | saved.checksums()
    finally:
        host.shutdown()


def _held(key: str) -> Saved | None:
    """The snapshot of this key, opened and verified; None if there is none. A damaged one is removed."""
    entry = cache.lookup(KIND, key)
    if entry is None:
        return None
    try:
        with lab_errors(entry.folder):
            meta, held = entry.meta, Saved.at(entry.folder).held()
            sound = held.checksums() == {name: meta[name] for name in ("ram", "devices")}
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        note(f"the snapshot {entry.folder} is damaged; it is made anew")
        cache.remove(entry)
        return None
    with suppress(FileNotFoundError):  # another process may just have removed it; it is open here
        os.utime(entry.folder / "meta.json")
    cache.keep_within(KIND, BUDGET)
    return held
