"""Saved hosts: each kind of host is booted once, saved with its agent ready, and restored as often as one likes.

A snapshot is kept under a key of everything that it came from; one that does not match the checksums it was saved with
is made anew. Those used last stay, as far as the budget of disk goes.
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
from arm_kvm.support.limits import refusals_told
from arm_kvm.support.progress import note

KIND = "snapshots"
#: Bytes of disk for all of them; one takes 70 to 130 MB.
BUDGET = 3 << 30
_FORMAT = 1  #: raise it when what a saved host has done before it was saved changes


@dataclass
class Snapshot:
    """A host of this kind as it was when its agent first answered."""

    config: HostConfig
    kernel: Kernel
    saved: Saved
    origin: Origin = field(default_factory=Origin)  #: of all hosts restored from it

    def restore(self, logs: Path, plugin: Plugin | None = None, entropy: bytes = b"") -> Host:
        """A host that nobody has touched; see :meth:`arm_kvm.host.host.Host.restore`."""
        return Host.restore(
            self.config, self.kernel, self.saved, logs, plugin=plugin, entropy=entropy, origin=self.origin
        )


def obtain(config: HostConfig, kernel: Kernel, logs: Path) -> Snapshot:
    """The snapshot of this kind of host, made or made anew if need be.

    Raises what :meth:`Host.boot` raises, MachineError (QEMU does not save the machine), DiskFull.
    """
    key = key_of(config, kernel)
    held = _held(key)
    if held is None:
        cache.obtain(KIND, key, lambda out, work: _make(config, kernel, logs, out), sized=False)  # it has checksums
        held = _held(key)
    if held is None:
        raise MachineError(
            f"the snapshot of {config.name} did not stay as it was saved", remedy="see to the cache's disk"
        )
    return Snapshot(config, kernel, held)


def forget(snapshot: Snapshot) -> None:
    """This one does not restore: whoever wants one of its kind next has it made anew, unless somebody has already."""
    entry = cache.lookup(KIND, key_of(snapshot.config, snapshot.kernel))
    with suppress(FileNotFoundError):  # just removed
        if entry and os.path.samefile(Saved.at(entry.folder).ram, snapshot.saved.ram):
            cache.remove(entry)


def key_of(config: HostConfig, kernel: Kernel) -> str:
    """Of QEMU, board, kernel, root file system, command line and agent."""
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
        files.host_key,  # made anew with the root file system
    )


def _make(config: HostConfig, kernel: Kernel, logs: Path, out: Path) -> dict:
    host = Host.boot(config, kernel, logs)
    try:
        saved = host.machine.save(out)
        return {"host": config.name, "kernel": kernel.name, "release": host.release} | saved.checksums()
    finally:
        host.shutdown()


def _held(key: str) -> Saved | None:
    """The snapshot of this key, opened and found whole; None when there is none, or no longer."""
    entry = cache.lookup(KIND, key)
    if entry is None:
        return None
    try:
        with refusals_told(entry.folder):
            meta, held = entry.meta, Saved.at(entry.folder).held()
            sound = held.checksums() == {name: meta[name] for name in ("ram", "devices")}
    except (OSError, ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        note(f"the snapshot {entry.folder} is damaged; it is made anew")
        cache.remove(entry)
        return None
    with suppress(FileNotFoundError):  # another process may find it too much meanwhile; it is open here
        os.utime(entry.folder / "meta.json")
    cache.keep_within(KIND, BUDGET)
    return held
