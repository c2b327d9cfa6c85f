"""A kernel that can be booted: an image QEMU understands, and the modules it needs in load order."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from arm_kvm.support.errors import KernelError

_ZIMAGE_MAGIC = (0x24, struct.pack("<I", 0x016F2818))  # Documentation/arm/booting.rst
_IMAGE_MAGIC = (0x38, b"ARM\x64")  # Documentation/arm64/booting.rst
_HEADERS = 0x1000  #: bytes; what an image says of itself is in them
_ARCH_NAMES = {"arm": "a 32-bit Arm", "arm64": "an arm64"}


@dataclass(frozen=True)
class Kernel:
    """``name`` is what the header of a run shows; ``modules`` are (file name, contents) in load order."""

    name: str
    image: Path
    modules: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def unpacked_size(self) -> int:
        """About how many bytes of memory its code and data take: an image that unpacks itself is a quarter of that."""
        with self.image.open("rb") as f:
            plain = f.read(64)[_IMAGE_MAGIC[0] :].startswith(_IMAGE_MAGIC[1])
        return self.image.stat().st_size * (1 if plain else 4)


def _magic(head: bytes) -> str | None:
    for arch, (offset, magic) in {"arm": _ZIMAGE_MAGIC, "arm64": _IMAGE_MAGIC}.items():
        if head[offset : offset + len(magic)] == magic:
            return arch
    return None


def architecture_of(image: Path) -> str | None:
    """``arm`` or ``arm64`` by the image's own header (a gzipped Image too), None for anything else.

    Raises KernelError when the file cannot be read.
    """
    if image.exists() and not image.is_file():  # a FIFO would be waited for
        raise KernelError(f"cannot read the kernel {image}: it is not a file")
    try:
        with image.open("rb") as f:
            head = f.read(64)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(image) as f:
                head = f.read(64)
    except (OSError, EOFError) as e:
        raise KernelError(f"cannot read the kernel {image}: {getattr(e, 'strerror', None) or e}") from e
    return _magic(head)


def _require_whole(image: Path) -> None:
    """Raises KernelError for a file that was cut, as far as its header tells: a zImage's, an Image's, or gzip's end."""
    with image.open("rb") as f:
        head, size = f.read(_HEADERS), os.fstat(f.fileno()).st_size
    try:
        if head[:2] == b"\x1f\x8b":
            with gzip.open(image) as f:
                while f.read(1 << 20):
                    pass
    except (OSError, EOFError) as e:
        raise KernelError(f"cannot read the kernel {image}: {e}", remedy="copy it again") from e
    try:
        whole = _size_by_headers(head)
    except struct.error as e:
        raise KernelError(f"{image} was cut: {size:,} bytes, not even its headers", remedy="copy it again") from e
    if size < whole:
        raise KernelError(f"{image} was cut: {size:,} of {whole:,} bytes", remedy="copy it again")


def _size_by_headers(head: bytes) -> int:
    """Bytes of the whole image, as far as its headers tell. Raises struct.error: they are cut themselves."""
    offset, magic = _ZIMAGE_MAGIC
    if head[offset : offset + 4] == magic:
        start, end = struct.unpack_from("<II", head, offset + 4)
        return end - start
    return _size_by_sections(head)


def _size_by_sections(head: bytes) -> int:
    """Bytes of a file that is an EFI program, too (arch/arm64/kernel/efi-header.S); 0 for one that is none.

    An Image's own header tells how much memory it takes, with what is not in the file.
    """
    at = struct.unpack_from("<I", head, 0x3C)[0] if head[:2] == b"MZ" else len(head)
    if head[at : at + 4] != b"PE\0\0":
        return 0
    sections, more = struct.unpack_from("<H12xH", head, at + 6)  # IMAGE_FILE_HEADER: how many, size of what follows
    tables = [at + 24 + more + 40 * n for n in range(sections)]
    ends = [sum(struct.unpack_from("<II", head, table + 16)) for table in tables if table + 40 <= len(head)]
    return max(ends, default=0)


def check_image(image: Path, linux_arch: str) -> Path:
    """The image, if a board of this architecture can boot it. Raises KernelError."""
    arch = architecture_of(image)
    if arch == linux_arch:
        _require_whole(image)
        return image
    what = f"is {_ARCH_NAMES[arch]} kernel" if arch else "is not an Arm kernel image (zImage or Image)"
    raise KernelError(
        f"{image} {what}; this host needs {_ARCH_NAMES[linux_arch]} one",
        remedy="give an arch/arm/boot/zImage or arch/arm64/boot/Image; with several hosts, --kernel HOST=IMAGE",
    )
