"""A stopped machine in files: its RAM, with holes, and what QEMU saves of its devices.

Both have a checksum, made when they were written. What does not match it is not trusted: the check reads the whole of
RAM once in the life of a lab process, which then keeps the file open.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from arm_kvm.machine.ram import chunks


@dataclass(frozen=True)
class Saved:
    """A saved machine: the files of its RAM and of its devices."""

    ram: Path
    devices: Path

    @classmethod
    def at(cls, folder: Path) -> Saved:
        return cls(folder / "ram", folder / "devices")

    def held(self) -> Saved:
        """The same files, which stay as long as this process, whoever removes them. Raises OSError."""
        fds = (os.open(self.ram, os.O_RDWR | os.O_CLOEXEC), os.open(self.devices, os.O_RDONLY | os.O_CLOEXEC))
        return Saved(*(Path(f"/proc/{os.getpid()}/fd/{fd}") for fd in fds))

    @contextmanager
    def devices_pipe(self) -> Iterator[int]:
        """The end of a pipe from which the state of the devices is read. Raises OSError: more than a pipe may hold."""
        state = self.devices.read_bytes()
        end, other = os.pipe()
        try:
            with open(other, "wb") as pipe:
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, len(state))
                pipe.write(state)
            yield end
        finally:
            os.close(end)

    def write_ram(self, fd: int) -> None:
        """Save RAM; zeros become holes."""
        with self.ram.open("wb") as f:
            copy(fd, f.fileno())

    def checksums(self) -> dict[str, str]:
        """Of both files, as they are now. Raises OSError."""
        with self.ram.open("rb") as f:
            ram = hashlib.sha256(os.fstat(f.fileno()).st_size.to_bytes(8, "little"))
            for at, data in chunks(f.fileno()):
                ram.update(at.to_bytes(8, "little") + data)
        return {"ram": ram.hexdigest(), "devices": hashlib.sha256(self.devices.read_bytes()).hexdigest()}


def copy(source: int, target: int) -> None:
    """Copy a file with its holes."""
    os.ftruncate(target, os.fstat(source).st_size)
    for at, data in chunks(source):
        os.pwrite(target, data, at)
