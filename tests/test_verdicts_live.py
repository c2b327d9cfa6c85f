"""Every verdict on a real host: tables corrupted in the machine's RAM, wrong records of memslots, real splats.

The kernel is correct. The test corrupts its tables through the gdbstub, checks the verdict, and restores them.
"""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from arm_kvm.model.arch import descriptors as d
from arm_kvm.model.kvm.memslots import SlotFlags
from arm_kvm.model.kvm.notifier import Operation
from arm_kvm.oracle import Verdict, Violation
from arm_kvm.oracle.ftrace import traced
from arm_kvm.support.errors import TraceError
from arm_kvm.vmm.memory import Advice, Prot

IPA = 0x8000_0000
PAGE = 0x1000


@pytest.fixture
def memory(vm):
    """64 KiB at IPA, its first eight pages written by the guest."""
    memory = vm.add_memory(IPA, 16 * PAGE)
    vm.guest.fill(IPA, 8)
    return memory


@pytest.fixture
def entry_of(host, oracle):
    """``entry_of(vm, ipa)``: physical address and value of the entry that maps ``ipa``."""

    def find(vm, ipa):
        stage2, _ = oracle.examine(vm)[0]
        desc = stage2.leaf(ipa).desc
        for page in stage2.tables.pages:
            words = host.machine.ram.fetch(page + np.arange(512, dtype=np.uint64) * np.uint64(8))
            if len(at := np.flatnonzero(words == desc)):
                return int(page) + int(at[0]) * 8, desc
        raise AssertionError(f"no entry holds {desc:#x}")

    return find


@pytest.fixture
def stored(host):
    """``with stored(pa, word, then=old):`` the word is in RAM within the block, ``old`` after it."""

    def write(pa, word):
        with host.machine.gdb.pause() as gdb:
            gdb.write_memory(pa, word.to_bytes(8, "little"))

    @contextmanager
    def store(pa, word, then):
        write(pa, word)
        try:
            yield
        finally:
            write(pa, then)

    return store


def test_a_leaf_is_lost_while_guests_run(vm, memory, host, witness, entry_of, stored):
    """A leaf that no guest uses disappears, and the kernel has called the notifiers for another page only."""
    pa, desc = entry_of(vm, IPA + 3 * PAGE)
    with vm.guest.hammering(IPA + 4 * PAGE, 4), stored(pa, desc, then=desc):
        with witness(Operation.DONTNEED, memory, 4 * PAGE, PAGE, exact=False):
            memory.advise(Advice.DONTNEED, 4 * PAGE, PAGE)
        with pytest.raises(Violation) as caught, witness(Operation.DONTNEED, memory, 4 * PAGE, PAGE, exact=False):
            memory.advise(Advice.DONTNEED, 4 * PAGE, PAGE)
            with host.machine.gdb.pause() as gdb:
                gdb.write_memory(pa, bytes(8))
    assert [(f.verdict, f.ipa) for f in caught.value.findings] == [(Verdict.LOST, IPA + 3 * PAGE)]


CORRUPTIONS = {
    Verdict.WRONG_FRAME: lambda desc: desc ^ (1 << 13),
    Verdict.WRONG_MEMORY_TYPE: lambda desc: desc & ~d.MEMATTR.mask | d.MEMATTR.put(d.MemAttr.DEVICE_nGnRE),
    Verdict.MALFORMED_ENTRY: lambda desc: desc & ~2,
}


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupted_leaf_is_caught_under_its_name(vm, memory, oracle, entry_of, stored, kind):
    pa, desc = entry_of(vm, IPA + 3 * PAGE)
    with stored(pa, CORRUPTIONS[kind](desc), then=desc):
        with pytest.raises(Violation) as caught:
            oracle.stage2(vm)
        assert caught.value.verdicts == {kind}
        assert caught.value.findings[0].ipa == IPA + 3 * PAGE
    assert oracle.examine(vm)[0][1] == []


def made_writable(vm, oracle, entry_of, stored, ipa):
    pa, desc = entry_of(vm, ipa)
    assert not d.s2_writable(desc)
    with stored(pa, desc | 1 << 7, then=desc):
        _, findings = oracle.examine(vm)[0]
    return [(f.verdict, f.ipa, f.expected.partition(" (")[0]) for f in findings]


def test_write_permission_in_a_read_only_memslot(vm, oracle, entry_of, stored):
    vm.add_memory(IPA, PAGE, flags=SlotFlags.READONLY).write(0, b"x")
    vm.guest.read(IPA)
    found = made_writable(vm, oracle, entry_of, stored, IPA)
    assert found == [(Verdict.EXCESS_PERMISSION, IPA, "not writable: the memslot is read-only")]


def test_write_permission_on_memory_that_the_host_maps_read_only(vm, memory, oracle, entry_of, stored):
    memory.protect(Prot.READ)
    vm.guest.read(IPA)
    ((kind, ipa, expected),) = made_writable(vm, oracle, entry_of, stored, IPA)
    assert (kind, ipa) == (Verdict.EXCESS_PERMISSION, IPA) and ", ro at HVA" in expected


def test_write_permission_on_a_clean_page(vm, memory, oracle, entry_of, stored):
    vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
    vm.dirty_pages(IPA)
    vm.guest.read(IPA)
    found = made_writable(vm, oracle, entry_of, stored, IPA)
    assert found == [(Verdict.EXCESS_PERMISSION, IPA, "not writable: clean in the dirty log")]


def test_a_memslot_that_is_not_recorded(vm, memory, oracle):
    """The lab's record lacks a memslot: its leaves are then outside every memslot."""
    slot = vm.slots.pop(vm.slot_at(IPA).slot)
    _, findings = oracle.examine(vm)[0]
    vm.slots[slot.slot] = slot
    assert [(f.verdict, f.ipa, f.size) for f in findings] == [(Verdict.OUTSIDE_MEMSLOTS, IPA, 8 * PAGE)]


def test_a_memslot_that_is_recorded_with_another_hva(vm, memory, oracle):
    """Every leaf of the memslot then has the wrong frame."""
    slot = vm.slot_at(IPA)
    vm.slots[slot.slot] = replace(slot, hva=slot.hva + PAGE)
    _, findings = oracle.examine(vm)[0]
    vm.slots[slot.slot] = slot
    assert {f.verdict for f in findings} == {Verdict.WRONG_FRAME}
    assert sum(f.size for f in findings) == 8 * PAGE


def test_a_leaf_that_reaches_a_table(vm, memory, oracle, entry_of, stored):
    pa, desc = entry_of(vm, IPA)
    table = pa & ~(PAGE - 1)
    with stored(pa, desc & ~d.Format().address_field() | table, then=desc):
        _, findings = oracle.examine(vm)[0]
    assert {f.verdict for f in findings} == {Verdict.SHARED_TABLE, Verdict.WRONG_FRAME}


def test_a_table_that_two_vms_share(host, make_vm, oracle, stored):
    one, two = make_vm(), make_vm()
    for vm in (one, two):
        vm.add_memory(IPA, PAGE)
        vm.guest.write(IPA, 1)
        oracle.examine(vm)[0]
    slots = [oracle.locator.known(vm).root + (IPA >> 30) * 8 for vm in (one, two)]
    entries = [int(host.machine.ram.fetch(np.array([slot], dtype=np.uint64))[0]) for slot in slots]
    with stored(slots[1], entries[0], then=entries[1]):
        assert Verdict.SHARED_TABLE in {f.verdict for f in oracle.examine(two)[0][1]}
    assert oracle.examine(two)[0][1] == []


def test_a_splat_in_the_kernel_log(host, isa, vm, oracle):
    """A message as of WARN_ON, written to the host's kernel log."""
    host.ssh.run("echo '<4>WARNING: CPU: 0 PID: 1 at arch/arm/kvm/mmu.c:1 made_up+0x0/0x4' > /dev/kmsg")
    (finding,) = oracle.splats()
    assert finding.verdict is Verdict.KERNEL_SPLAT and "made_up" in finding.found
    assert oracle.splats() == []


def test_a_trace_that_lost_events(host, isa):
    """A trace buffer of one page, and more events than it holds."""
    ring = "/sys/kernel/tracing/instances/arm-kvm/buffer_size_kb"
    host.ssh.run(f"echo 4 > {ring}")
    try:
        with pytest.raises(TraceError, match="LOST"), traced(host.agent, ["kmem:mm_page_alloc", "kmem:mm_page_free"]):
            host.ssh.run("for i in $(seq 20); do ls /proc > /dev/null; done")
    finally:
        host.ssh.run(f"echo 4096 > {ring}")
