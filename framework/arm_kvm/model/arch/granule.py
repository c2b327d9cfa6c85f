"""Translation granules: the page size, and what follows from it at each level.

Source: ARM DDI 0487, D8.2 (granule sizes and levels of lookup). Armv7 LPAE has the 4 KiB granule only (DDI 0406C.d,
B3.6).
"""

from __future__ import annotations

from dataclasses import dataclass

LAST_LEVEL = 3


@dataclass(frozen=True)
class Granule:
    """Page and table size ``1 << shift`` bytes; ``top_block`` is the first level that can hold a block.

    ``top_block`` holds for 48-bit output addresses (no FEAT_LPA, no FEAT_LPA2).
    """

    shift: int
    top_block: int

    @property
    def size(self) -> int:
        """Bytes of a page, and of a table."""
        return 1 << self.shift

    @property
    def stride(self) -> int:
        """Bits of input address that one level resolves."""
        return self.shift - 3

    @property
    def entries(self) -> int:
        """Descriptors in one table."""
        return 1 << self.stride

    def level_shift(self, level: int) -> int:
        """log2 of the bytes that one entry of this level maps."""
        return self.shift + self.stride * (LAST_LEVEL - level)

    def __str__(self) -> str:
        return f"{self.size >> 10} KiB"


KIB4 = Granule(12, top_block=1)
KIB16 = Granule(14, top_block=2)
KIB64 = Granule(16, top_block=2)
