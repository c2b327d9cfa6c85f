"""change_pte against another system call of the same VMM that takes the page away.

Up to 6.9 a copy on write notified KVM of the new frame (set_pte_at_notify, kvm_set_spte_hva), and KVM mapped it at once
where it still had a level 3 table. A page that is being taken away must not be left mapped by that. The race is forced:
CPU 1 takes the page away and is held at a symbol of the kernel while the VMM stores to the page on CPU 0.
"""

import struct

import pytest
from arm_kvm.vocabulary import PAGE, Advice, Child, Verdict, op

IPA = 0x8000_0000
PAGES = 32
pytestmark = [pytest.mark.native]


@pytest.fixture
def taker(host):
    """A thread of the VMM on CPU 1, which takes the page away."""
    return host.actor(cpu=1)


class Pinned:
    """A page that a pipe holds by reference (vmsplice(2)): its frame is not reused, and shows what was stored to it."""

    def __init__(self, host, vm, hva):
        """Prepare the pipe: while the taker is held, the VMM cannot map memory."""
        self._host, self._scratch = host, vm.memory(PAGE)
        host.system_call("pipe2", self._scratch.hva, 0)
        self._out, self._in = struct.unpack("<2I", self._scratch.read(0, 8))
        self._scratch.write(0, struct.pack("<2I" if vm.host_bits == 32 else "<2Q", hva, PAGE))  # struct iovec

    def pin(self):
        self._host.system_call("vmsplice", self._in, self._scratch.hva, 1, 0)

    def release(self):
        """Return the page's content, and give it up."""
        self._host.system_call("read", self._out, self._scratch.hva, PAGE)
        for end in (self._in, self._out):
            self._host.agent(op.file_close, file=end)
        return self._scratch.read(0, PAGE)


def test_into_a_memslot_that_is_being_deleted(host, vm, oracle, taker, known_fault):
    """The memslot is invalid and its pages are unmapped, but it is not gone yet: nothing may be mapped through it.

    kvm_set_memslot() in virt/kvm/kvm_main.c. Both memslots are in the same 2 MiB, so the level 3 table survives.
    """
    memory = vm.memory(2 * PAGES * PAGE, align=2 * PAGES * PAGE)
    memory.write(0, b"host" * (2 * PAGES * PAGE // 4))
    vm.add_memory(IPA, PAGES * PAGE, memory=memory.part(0, PAGES * PAGE))
    vm.add_memory(IPA + PAGES * PAGE, PAGES * PAGE, memory=memory.part(PAGES * PAGE, PAGES * PAGE))
    vm.guest.read(IPA + 4 * PAGE)
    child = Child(host.agent)  # from now on the VMM's stores are copies on write
    vm.guest.read(IPA + (PAGES + 4) * PAGE)  # makes the level 3 table; 5.4.y would copy the other page for a load

    with host.hold("kvm_arch_prepare_memory_region", cpu=1) as held:
        deletion = taker.do(vm.record_deletion(IPA))
        held.wait()  # KVM has unmapped the memslot's pages
        memory.write(4 * PAGE, b"copy")
    deletion.result()
    child.end()

    (stage2, findings) = oracle.examine(vm)[0]
    if {finding.verdict for finding in findings} == {Verdict.OUTSIDE_MEMSLOTS}:
        assert [finding.ipa for finding in findings] == [IPA + 4 * PAGE]
        vm.destroy()
        known_fault("page-in-deleted-memslot-after-change-pte")
    assert findings == [] and stage2.leaf(IPA + 4 * PAGE) is None
    vm.guest.read(IPA + 4 * PAGE)
    assert [exit_.ipa for exit_ in vm.exits] == [IPA + 4 * PAGE], "the IPA of the deleted memslot is not MMIO"


def test_of_a_page_that_is_being_dropped(host, vm, oracle, taker, known_fault):
    """MADV_DONTNEED has notified KVM but not dropped the page yet, when a store of the VMM replaces it.

    unmap_page_range() in mm/memory.c (7.2: __zap_vma_range()) runs between the start and the end of the invalidation.
    """
    memory = vm.add_memory(IPA, PAGES * PAGE, align=PAGES * PAGE)
    vm.guest.fill(IPA + 16 * PAGE, 8)  # keeps the level 3 table alive
    pinned = Pinned(host, vm, memory.hva + 4 * PAGE)
    memory.read(4 * PAGE, PAGE)  # maps the zero page, so the VMM's store is a copy on write

    with host.hold("unmap_page_range", "__zap_vma_range", cpu=1) as held:
        drop = taker.begin(op.memory_advise, hva=memory.hva + 4 * PAGE, size=PAGE, advice=Advice.DONTNEED)
        held.wait()  # KVM has unmapped the page
        memory.write(4 * PAGE, b"copy")
        pinned.pin()
        copy = memory.frame(4 * PAGE)
    drop.result()

    assert copy and memory.frame(4 * PAGE) == 0, "MADV_DONTNEED has not dropped the copy"
    (stage2, findings) = oracle.examine(vm)[0]
    if {finding.verdict for finding in findings} == {Verdict.WRONG_FRAME}:
        assert [finding.ipa for finding in findings] == [IPA + 4 * PAGE]
        stale = stage2.leaf(IPA + 4 * PAGE)
        assert stale.pa == copy and not stale.writable
        vm.guest.write(IPA + 4 * PAGE, 0xCAFE)  # a permission fault
        after = oracle.examine(vm)[0][0].leaf(IPA + 4 * PAGE)
        in_memory, in_copy = memory.read(4 * PAGE, 2), pinned.release()[:2]
        vm.destroy()
        if after.pa != copy:
            assert (in_memory, in_copy) == (b"\xfe\xca", b"co")
            known_fault("stale-page-until-next-fault")
        assert after.writable and (in_memory, in_copy) == (bytes(2), b"\xfe\xca"), "the store went to the dropped frame"
        known_fault("stale-page-after-change-pte")
    pinned.release()
    assert findings == [] and stage2.leaf(IPA + 4 * PAGE) is None
    vm.guest.write(IPA + 4 * PAGE, 0xCAFE)
    assert memory.read(4 * PAGE, 2) == b"\xfe\xca"
