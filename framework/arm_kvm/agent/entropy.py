"""The kernel's random numbers."""

from __future__ import annotations

import struct

from .libc import ioctl

_ADD_ENTROPY = 0x40085203  # RNDADDENTROPY, include/uapi/linux/random.h
_RESEED = 0x5207  # RNDRESEEDCRNG


def add(data: bytes) -> None:
    """Mix ``data`` into the pool and reseed, so that what /dev/urandom returns from now on depends on it."""
    with open("/dev/urandom", "wb") as f:
        ioctl("RNDADDENTROPY", f.fileno(), _ADD_ENTROPY, struct.pack("ii", 8 * len(data), len(data)) + data)
        ioctl("RNDRESEEDCRNG", f.fileno(), _RESEED)
