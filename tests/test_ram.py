"""The board's RAM as table walks read it, from a file: words in any order, whole tables, zeros outside RAM."""

import os

import numpy as np
import pytest
from arm_kvm.machine.ram import Ram
from hypothesis import given
from hypothesis import strategies as st

BASE, PAGES, BEFORE = 0x4000_0000, 16, 3  #: pages of RAM, and of the file before it
SIZE = PAGES * 0x1000
WORDS = np.random.default_rng(1).integers(1, 1 << 63, PAGES * 512, dtype=np.uint64)


@pytest.fixture(scope="module")
def ram():
    fd = os.memfd_create("ram")
    os.pwrite(fd, bytes(BEFORE * 0x1000) + WORDS.tobytes() + b"\xff" * 0x1000, 0)
    ram = Ram(fd, BEFORE * 0x1000, BASE, SIZE)
    yield ram
    ram.close()


def word(pa):
    return int(WORDS[(pa - BASE) // 8]) if BASE <= pa < BASE + SIZE else 0


@given(st.lists(st.integers(-600, PAGES * 512 + 600)))
def test_words_in_any_order(ram, numbers):
    pas = [BASE + 8 * number for number in numbers]
    assert ram.fetch(np.array(pas, dtype=np.uint64)).tolist() == [word(pa) for pa in pas]


@pytest.mark.parametrize("entries", [2, 512, 1024, 8192])
def test_tables_by_the_row(ram, entries):
    """Also where only part of a table is in RAM."""
    bases = [BASE + page * 0x1000 for page in (5, 0, 5, PAGES - 1, PAGES)]
    rows = ram.tables(np.array(bases, dtype=np.uint64), entries)
    assert rows.tolist() == [[word(base + 8 * i) for i in range(entries)] for base in bases]
    inside = ram.tables(np.array(bases[:1], dtype=np.uint64), 512)
    assert inside.tolist() == [WORDS[5 * 512 : 6 * 512].tolist()]
