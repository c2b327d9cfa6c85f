"""Fixtures that follow a VM's table pages through the page allocator's own trace events."""

from contextlib import contextmanager

import numpy as np
import pytest
from arm_kvm.vocabulary import PAGE


class Pages:
    """The frames that the page allocator gave out, took back and zeroed within one block, as physical addresses."""

    def __init__(self):
        self.allocated, self.freed, self.zeroed = set(), set(), set()

    def add(self, event):
        first = event.fields["pfn"] * PAGE
        frames = {first + n * PAGE for n in range(1 << event.fields.get("order", 0))}
        if event.name == "mm_page_alloc":
            self.allocated |= frames
            if "__GFP_ZERO" in event.text:
                self.zeroed |= frames
        else:
            self.freed |= frames


@pytest.fixture
def page_trace(trace):
    """``with page_trace() as pages:`` records the page allocator's events; ``pages`` is complete after the block."""

    @contextmanager
    def record():
        pages = Pages()
        with trace("kmem:mm_page_alloc", "kmem:mm_page_free", "kmem:mm_page_free_batched") as events:
            yield pages
        for event in events:
            pages.add(event)

    return record


@pytest.fixture
def tables(stage2):
    """``tables(vm)``: the frames of the VM's stage-2 tables now, including the root's."""
    return lambda vm: set(stage2(vm).tables.pages.tolist())


@pytest.fixture
def root(stage2):
    """``root(vm)``: the frames of the VM's root: one table, or several concatenated ones."""

    def frames(vm):
        regime = stage2(vm).regime
        return {regime.root + n * PAGE for n in range(regime.root_pages)}

    return frames


@pytest.fixture
def entries(host):
    """``entries(frames)``: the descriptors in these table pages, as one array."""

    def words(frames):
        return np.concatenate([np.frombuffer(host.machine.ram.read(pa, PAGE), dtype="<u8") for pa in sorted(frames)])

    return words
