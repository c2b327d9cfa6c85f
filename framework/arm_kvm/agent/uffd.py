"""userfaultfd: the agent resolves the page faults of its own memory, including those of its guests.

The structures are packed by hand (include/uapi/linux/userfaultfd.h, 5.4 and 6.1) and are the same for 32 and 64 bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import struct
import threading

from . import ioctls, libc, placement

_VERSION = 0xAA
_FEATURE_WP = 1
_MODE_MISSING, _MODE_WP = 1, 2
_PROTECT = 1
_PAGEFAULT = 0x12
_FLAG_WP = 2
_MESSAGE = struct.Struct("<B7xQQ8x")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Handler:
    """Resolves the faults of one range: fills a missing page (:func:`content_of`), unprotects a protected one.

    ``seen`` lists the faults as (address, "missing" or "write-protect").
    """

    def __init__(self, hva: int, size: int, protect: bool) -> None:
        self._fd = libc.syscall("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
        self.seen: list[tuple[int, str]] = []
        try:
            libc.ioctl(ioctls.UFFDIO_API, self._fd, struct.pack("<QQQ", _VERSION, _FEATURE_WP if protect else 0, 0))
            mode = _MODE_WP if protect else _MODE_MISSING
            libc.ioctl(ioctls.UFFDIO_REGISTER, self._fd, struct.pack("<QQQQ", hva, size, mode, 0))
            if protect:
                self._protect(hva, size, True)
        except OSError:
            os.close(self._fd)
            raise
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="userfaultfd", daemon=True)
        with placement.anywhere():
            self._thread.start()

    def _protect(self, hva: int, size: int, on: bool) -> None:
        libc.ioctl(ioctls.UFFDIO_WRITEPROTECT, self._fd, struct.pack("<QQQ", hva, size, _PROTECT if on else 0))

    def _serve(self) -> None:
        page = ctypes.create_string_buffer(2 * _PAGE)
        source = -(-ctypes.addressof(page) // _PAGE) * _PAGE
        while not self._over.is_set():
            if not select.select([self._fd], [], [], 0.05)[0]:
                continue
            try:
                event, flags, address = _MESSAGE.unpack(os.read(self._fd, 32))
            except BlockingIOError:  # it was resolved with an earlier fault of the same page
                continue
            if event != _PAGEFAULT:
                continue
            address &= -_PAGE
            if flags & _FLAG_WP:
                self.seen.append((address, "write-protect"))
                self._protect(address, _PAGE, False)
            else:
                self.seen.append((address, "missing"))
                ctypes.memmove(source, struct.pack("<I", content_of(address)), 4)
                self._copy(address, source)

    def _copy(self, address: int, source: int) -> None:
        """Fill the page. EEXIST: it was filled for another fault, and this task finds it (handle_userfault)."""
        with contextlib.suppress(FileExistsError):
            libc.ioctl(ioctls.UFFDIO_COPY, self._fd, struct.pack("<QQQQq", address, source, _PAGE, 0, 0))

    def end(self) -> list[tuple[int, str]]:
        self._over.set()
        self._thread.join()
        os.close(self._fd)
        return self.seen


def content_of(address: int) -> int:
    """Return the first word of the page that a fault at ``address`` is resolved with."""
    return address >> 12 & 0xFFFF_FFFF | 0x8000_0000
