"""A saved machine: a sparse file of its RAM, and the state of its devices as QEMU migrates it.

The checksums of both are taken when they are written. A lab process verifies them once, which reads all of RAM, and
then keeps the files open.
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
    """The files of a saved machine's RAM and devices."""

    ram: Path
    devices: Path

    @classmethod
    def at(cls, folder: Path) -> Saved:
        """The files in this folder; they need not exist yet."""
        return cls(folder / "ram", folder / "devices")

    def held(self) -> Saved:
        """Open the files, and return paths to them that stay valid in this process after removal. Raises OSError."""
        fds = (os.open(self.ram, os.O_RDWR | os.O_CLOEXEC), os.open(self.devices, os.O_RDONLY | os.O_CLOEXEC))
        return Saved(*(Path(f"/proc/{os.getpid()}/fd/{fd}") for fd in fds))

    @contextmanager
    def devices_pipe(self) -> Iterator[int]:
        """Within the block, a pipe that holds the devices' state. Raises OSError if it is more than a pipe may hold."""
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
        """Save the RAM in the file ``fd``; zeros become holes."""
        with self.ram.open("wb") as f:
            copy(fd, f.fileno())

    def checksums(self) -> dict[str, str]:
        """Compute the checksums of both files. Raises OSError."""
        with self.ram.open("rb") as f:
            ram = hashlib.sha256(os.fstat(f.fileno()).st_size.to_bytes(8, "little"))
            for at, data in chunks(f.fileno()):
                ram.update(at.to_bytes(8, "little") + data)
        return {"ram": ram.hexdigest(), "devices": hashlib.sha256(self.devices.read_bytes()).hexdigest()}


def copy(source: int, target: int) -> None:
    """Copy a file, leaving holes where it is zero."""
    os.ftruncate(target, os.fstat(source).st_size)
    for at, data in chunks(source):
        os.pwrite(target, data, at)
