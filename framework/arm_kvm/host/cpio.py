"""Write a cpio archive in the kernel's format, "newc" (Documentation/driver-api/early-userspace/buffer-format)."""

from __future__ import annotations

import stat
import tarfile
from collections.abc import Callable
from typing import BinaryIO

_ALIGN = 4


class CpioWriter:
    """Appends entries to a file; end with :meth:`close`. The kernel also unpacks concatenated archives."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._folders: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes = b"", nlink: int = 1) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, nlink, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        header = b"070701" + b"".join(b"%08X" % f for f in fields)
        for part in (header + raw, data):
            self._out.write(part + b"\0" * (-len(part) % _ALIGN))

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Append a folder, after its parents, unless it is there already."""
        parent = name.rpartition("/")[0]
        if parent and parent not in self._folders:
            self.folder(parent)
        if name and name not in self._folders:
            self._folders.add(name)
            self._entry(name, stat.S_IFDIR | mode, nlink=2)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Append a file, after its folders."""
        self.folder(name.rpartition("/")[0])
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Append a symbolic link, after its folders."""
        self.folder(name.rpartition("/")[0])
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def tar(self, archive: tarfile.TarFile, keep: Callable[[str], bool]) -> None:
        """Append the members of a tar for which ``keep(name)`` is true; hard links become copies."""
        for member in archive:
            name = member.name.removeprefix("./").strip("/")
            if not name or name == "." or not keep(name):
                continue
            if member.isdir():
                self.folder(name, member.mode & 0o7777)
            elif member.issym():
                self.link(name, member.linkname)
            elif (member.isreg() or member.islnk()) and (content := archive.extractfile(member)):
                self.file(name, content.read(), member.mode & 0o7777)

    def close(self) -> None:
        """Append the trailer."""
        self._entry("TRAILER!!!", 0)
