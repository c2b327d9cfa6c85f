"""The kernel's random numbers."""

from __future__ import annotations

import struct

from . import ioctls
from .libc import ioctl


def add(data: bytes) -> None:
    """Mix ``data`` into the pool and reseed, so that what /dev/urandom returns from now on depends on it."""
    with open("/dev/urandom", "wb") as f:
        ioctl(ioctls.RNDADDENTROPY, f.fileno(), struct.pack("ii", 8 * len(data), len(data)) + data)
        ioctl(ioctls.RNDRESEEDCRNG, f.fileno())
