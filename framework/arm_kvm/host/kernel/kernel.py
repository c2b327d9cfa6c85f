"""A bootable kernel: an image that QEMU can load, and the modules that the host needs, in load order."""

from __future__ import annotations

import gzip
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from arm_kvm.support.errors import KernelError

_ZIMAGE_MAGIC = (0x24, struct.pack("<I", 0x016F2818))  # Documentation/arm/booting.rst
_IMAGE_MAGIC = (0x38, b"ARM\x64")  # Documentation/arm64/booting.rst
_HEADERS = 0x1000  #: bytes at the start of an image that contain its headers
_ARCH_NAMES = {"arm": "a 32-bit Arm", "arm64": "an arm64"}


@dataclass(frozen=True)
class Kernel:
    """A kernel. ``name`` is shown at the start of a run; ``modules`` are (file name, contents) in load order."""

    name: str
    image: Path
    modules: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def unpacked_size(self) -> int:
        """Estimate of the bytes of memory that its code and data take: four times the size of a compressed image."""
        with self.image.open("rb") as f:
            plain = f.read(64)[_IMAGE_MAGIC[0] :].startswith(_IMAGE_MAGIC[1])
        return self.image.stat().st_size * (1 if plain else 4)


def _magic(head: bytes) -> str | None:
    for arch, (offset, magic) in {"arm": _ZIMAGE_MAGIC, "arm64": _IMAGE_MAGIC}.items():
        if head[offset : offset + len(magic)] == magic:
            return arch
    return None


def architecture_of(image: Path) -> str | None:
    """``arm`` or ``arm64`` according to the image's header (of a gzipped Image too), None for anything else.

    Raises KernelError if the file cannot be read.
    """
    if image.exists() and not image.is_file():  # opening a FIFO would block
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
    """Raise KernelError for a truncated image, as far as the headers of a zImage or Image, or gzip's trailer, tell."""
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
        raise KernelError(f"{image} is truncated: {size:,} bytes, less than its headers", remedy="copy it again") from e
    if size < whole:
        raise KernelError(f"{image} is truncated: {size:,} of {whole:,} bytes", remedy="copy it again")


def _size_by_headers(head: bytes) -> int:
    """Bytes of the whole file, as far as its headers tell. Raises struct.error if they are truncated themselves."""
    offset, magic = _ZIMAGE_MAGIC
    if head[offset : offset + 4] == magic:
        start, end = map(int, struct.unpack_from("<II", head, offset + 4))
        return end - start
    return _size_by_sections(head)


def _size_by_sections(head: bytes) -> int:
    """Bytes of an Image that is also an EFI program (arch/arm64/kernel/efi-header.S); 0 for any other file.

    The size in an Image's own header is of memory, including what is not in the file.
    """
    at = struct.unpack_from("<I", head, 0x3C)[0] if head[:2] == b"MZ" else len(head)
    if head[at : at + 4] != b"PE\0\0":
        return 0
    # IMAGE_FILE_HEADER: NumberOfSections, SizeOfOptionalHeader
    sections, more = struct.unpack_from("<H12xH", head, at + 6)
    tables = [at + 24 + more + 40 * n for n in range(sections)]
    ends = [sum(struct.unpack_from("<II", head, table + 16)) for table in tables if table + 40 <= len(head)]
    return max(ends, default=0)


def check_image(image: Path, linux_arch: str) -> Path:
    """Return the image if a board of this architecture can boot it. Raises KernelError."""
    arch = architecture_of(image)
    if arch == linux_arch:
        _require_whole(image)
        return image
    what = f"is {_ARCH_NAMES[arch]} kernel" if arch else "is not an Arm kernel image (zImage or Image)"
    raise KernelError(
        f"{image} {what}; this host needs {_ARCH_NAMES[linux_arch]} one",
        remedy="give an arch/arm/boot/zImage or arch/arm64/boot/Image; with several hosts, --kernel HOST=IMAGE",
    )
