"""What a leaf may be: for each rule the pages that break it, and only those."""

from dataclasses import replace

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.kvm.contract import Limit, MappedPages
from arm_kvm.model.kvm.memslots import Memslot, SlotFlags, Window, covering

PAGE = 0x1000
IPA, HVA, PA = 0x8000_0000, 0x7000_0000, 0x5000_0000
DEVICE = 0x0801_0000
DEVICE_LEAF = {"memattr": d.MemAttr.DEVICE_nGnRE, "xn": d.Never.EL0_EL1}


def leaf(pa=PA, **kind):
    return d.encode(d.LeafFields(pa, **kind), 3)


def page(ipa=IPA, pa=PA, flags=SlotFlags.NONE, windows=(), desc=None, **more):
    """One page at ``ipa``, mapped as by the host except for ``more``; one memslot of four pages at IPA."""
    slots = [Memslot(2, IPA, 4 * PAGE, HVA, flags)]
    found = {"host_pa": PA, "host_mapped": True, "host_writable": True, "written": False, "is_ram": pa == PA} | more
    one = {name: np.array([value]) for name, value in found.items()}
    words = {name: np.array([value], dtype=np.uint64) for name, value in {"ipa": ipa, "pa": pa}.items()}
    desc = np.array([leaf(pa) if desc is None else desc], dtype=np.uint64)
    one["host_pa"] = one["host_pa"].astype(np.uint64)
    slot = covering(slots, words["ipa"])
    return MappedPages(**words, **one, desc=desc, slot=slot, slots=slots, windows=windows, format=d.LPAE)


def broken(pages):
    """The names of the rules that the page breaks."""
    plain = ("outside", "wrong_frame", "executable_device", "ram_of_other_type", "device_of_other_type")
    return [name for name in plain if getattr(pages, name)[0]] + [x for x in Limit if pages.writable_despite(x)[0]]


def test_a_page_as_the_host_maps_it_breaks_nothing():
    assert broken(page()) == []


def test_the_frame_is_the_hosts():
    assert broken(page(host_pa=PA + 0x123)) == []  # that of the byte
    assert broken(page(host_pa=PA + PAGE)) == broken(page(host_pa=0, host_mapped=False)) == ["wrong_frame"]
    assert broken(page(IPA + 4 * PAGE)) == broken(page(IPA - PAGE)) == ["outside"]


@pytest.mark.parametrize("flags", [SlotFlags.READONLY, SlotFlags.LOG_DIRTY_PAGES])
@pytest.mark.parametrize("written", [False, True])
def test_a_page_is_writable_only_as_far_as_its_memslot_allows(flags, written):
    limits = {SlotFlags.READONLY: [Limit.READONLY], SlotFlags.LOG_DIRTY_PAGES: [] if written else [Limit.CLEAN]}
    assert broken(page(flags=flags, written=written)) == limits[flags]
    assert broken(page(flags=flags, written=written, desc=leaf(s2ap=d.Grant.READ))) == []


def test_a_page_is_writable_only_where_the_hosts_mapping_is():
    assert broken(page(host_writable=False)) == [Limit.HOST]
    assert broken(page(host_writable=False, host_mapped=False, host_pa=0)) == ["wrong_frame"]
    both = SlotFlags.READONLY | SlotFlags.LOG_DIRTY_PAGES
    assert broken(page(host_writable=False, flags=both)) == list(Limit)


@pytest.mark.parametrize("kind", [{"memattr": d.MemAttr.NORMAL_NC}, {"sh": d.Shareability.OUTER}])
def test_ram_is_normal_write_back_inner_shareable(kind):
    assert broken(page(desc=leaf(**kind))) == ["ram_of_other_type"]


def test_a_device_is_of_a_device_type_and_not_executable():
    assert broken(page(pa=DEVICE, host_pa=DEVICE, desc=leaf(DEVICE, **DEVICE_LEAF))) == []
    assert broken(page(pa=DEVICE, host_pa=DEVICE)) == ["executable_device", "device_of_other_type"]


def test_a_window_maps_its_device_regardless_of_the_memslot():
    window, shown = Window(IPA - PAGE, 2 * PAGE, DEVICE), leaf(DEVICE, **DEVICE_LEAF)
    for ipa in (IPA - PAGE, IPA):
        pa = DEVICE + ipa - window.ipa
        assert broken(page(ipa, pa, SlotFlags.READONLY, (window,), leaf(pa, **DEVICE_LEAF), host_writable=False)) == []
        assert broken(page(ipa, pa, windows=(window,))) == ["executable_device", "device_of_other_type"]
    assert broken(page(IPA, DEVICE, windows=(window,), desc=shown)) == ["wrong_frame"]  # the other page of the device
    assert broken(page(IPA - 2 * PAGE, DEVICE - PAGE, windows=(window,), desc=leaf(**DEVICE_LEAF))) == ["outside"]


def test_without_memslots_nothing_is_limited_by_one():
    bare = replace(page(), slots=[], slot=np.array([-1]))
    assert broken(bare) == ["outside"]
