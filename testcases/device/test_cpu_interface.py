"""The GICv2 CPU interface as a guest sees it: the board's own registers, which KVM maps at the VM's first run.

virt/kvm/arm/vgic/vgic-v2.c vgic_v2_map_resources and virt/kvm/arm/mmu.c (5.4) kvm_phys_addr_ioremap map two pages as
device memory, read-write and never executable, wherever user space has placed them. Since 6.19 ("KVM: arm64: GICv2:
Always trap GICV_DIR register") they map only the first page: the second holds GICC_DIR, and KVM emulates the registers
that it does not map.
"""

import pytest
from arm_kvm.vocabulary import BLOCK, PAGE, Advice, Child, Frame, GuestException, Mmio, SlotFlags, Verdict, Violation
from arm_kvm.vocabulary import vgic as gicv2

GICD, GICC = 0x2C00_1000, 0x2C00_2000
SPI = 40
DEVICE_NGNRE = 0b0001


@pytest.fixture
def vgic(vm, make_vgic):
    """A GICv2 with its frames at GICD and GICC; the VM has not run."""
    vgic = make_vgic(vm)
    vgic.place(Frame.DISTRIBUTOR, GICD)
    vgic.place(Frame.CPU_INTERFACE, GICC)
    return vgic


def mapped(stage2, vm, ipa=GICC):
    return stage2(vm).mapped(ipa, gicv2.CPU_INTERFACE_SIZE)


def traps_dir(host):
    """Whether this KVM traps the page that holds GICC_DIR, and so emulates the interface where it is not mapped."""
    return host.kernel_version >= (6, 19)


def pages(host, ipa=GICC):
    """The IPAs at which KVM maps a CPU interface that is placed at ``ipa``."""
    return [ipa] if traps_dir(host) else [ipa, ipa + PAGE]


def switch_on(guest, spi=SPI):
    """Enable the distributor, one interrupt and the CPU interface, as a guest's driver does first."""
    guest.write(GICD + gicv2.GICD_ISENABLER + 4 * (spi // 32), 1 << spi % 32)
    guest.write(GICD + gicv2.GICD_CTLR, 1)
    guest.write(GICC + gicv2.GICC_PMR, 0xFF)
    guest.write(GICC + gicv2.GICC_CTLR, 1)


# -- how it is mapped ------------------------------------------------------------------------------------------


def test_mapped_at_the_first_run(vm, vgic, stage2, host):
    """The first run maps the board's GICV at the chosen IPA, without a fault."""
    vm.guest.ping()
    tables, gicv = stage2(vm), host.gicv
    assert mapped(stage2, vm) == pages(host)
    for ipa in pages(host):
        leaf = tables.leaf(ipa)
        assert leaf.pa == gicv + ipa - GICC and leaf.level == 3
        assert leaf.readable and leaf.writable and not leaf.executable
        assert leaf.memattr == DEVICE_NGNRE


def test_distributor_is_not_mapped(vm, vgic, stage2):
    """The distributor is emulated: every access traps to KVM, and none reaches user space."""
    assert vm.guest.read(GICD + gicv2.GICD_TYPER) & 0x1F == 7  # 256 interrupts
    assert stage2(vm).leaf(GICD) is None
    assert vm.exits == []


@pytest.mark.parametrize("ipa", [0, BLOCK - PAGE, 0x7FFF_F000, 0xFFFF_0000], ids=hex)
def test_any_page_will_do(vm, make_vgic, stage2, ipa, host):
    """Also where the two pages are the last of one table and the first of the next."""
    vgic = make_vgic(vm)
    vgic.place(Frame.DISTRIBUTOR, GICD)
    vgic.place(Frame.CPU_INTERFACE, ipa)
    vm.guest.ping()
    assert mapped(stage2, vm, ipa) == pages(host, ipa)


@pytest.mark.vcpus(2)
def test_all_vcpus_share_the_mapping(vm, make_vgic, stage2, host):
    """One mapping serves all vCPUs: the board's GIC banks the registers by CPU."""
    vgic = make_vgic(vm)
    vgic.place(Frame.DISTRIBUTOR, GICD)
    vgic.place(Frame.CPU_INTERFACE, GICC)
    assert vm.guests[0].read(GICC + gicv2.GICC_IIDR) == vm.guests[1].read(GICC + gicv2.GICC_IIDR)
    assert mapped(stage2, vm) == pages(host)


def test_every_vm_has_its_own(make_vm, make_vgic, stage2, host):
    """Two VMs map the same frames at different IPAs."""
    for place in (GICC, GICC + 0x10_0000):
        vm = make_vm()
        vgic = make_vgic(vm)
        vgic.place(Frame.DISTRIBUTOR, GICD)
        vgic.place(Frame.CPU_INTERFACE, place)
        vm.guest.ping()
        assert mapped(stage2, vm, place) == pages(host, place)


# -- how the guest uses it -----------------------------------------------------------------------------------------


def test_identification_register(vm, vgic):
    """GICC_IIDR reads as QEMU's GICv2 does (revision 2, implementer Arm), without an exit to user space."""
    assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0x0002_043B
    assert vm.exits == []


def test_registers_are_registers_and_not_memory(vm, vgic):
    """GICC_PMR keeps only the five priority bits of the value written."""
    vm.guest.write(GICC + gicv2.GICC_PMR, 0xFF)
    assert vm.guest.read(GICC + gicv2.GICC_PMR) == 0xF8
    assert vm.guest.read(GICC + gicv2.GICC_IAR) == gicv2.NOTHING_PENDING


def test_injected_interrupt_is_acknowledged(vm, vgic, stage2):
    switch_on(vm.guest)
    vgic.line(SPI, 1)
    assert vm.guest.read(GICC + gicv2.GICC_IAR) == SPI
    vm.guest.write(GICC + gicv2.GICC_EOIR, SPI)
    vgic.line(SPI, 0)
    assert vm.guest.read(GICC + gicv2.GICC_IAR) == gicv2.NOTHING_PENDING
    stage2(vm)


def test_injected_interrupt_is_taken(vm, vgic):
    """The guest sleeps in WFI until the interrupt's exception wakes it."""
    switch_on(vm.guest)
    vm.guest.await_interrupt(GICC)
    vgic.line(SPI, 1)
    assert vm.guest.interrupt_taken() == SPI


def test_level_comes_again_until_it_is_lowered(vm, vgic):
    vm.guest.write(GICD + gicv2.GICD_ICFGR + 4 * (SPI // 16), 0)
    switch_on(vm.guest)
    vgic.line(SPI, 1)
    for _ in range(3):
        vm.guest.await_interrupt(GICC)
        assert vm.guest.interrupt_taken() == SPI
    vgic.line(SPI, 0)
    vm.guest.ping()
    assert vm.guest.read(GICC + gicv2.GICC_IAR) == gicv2.NOTHING_PENDING


def test_execution_from_it_is_refused(vm, vgic):
    """An instruction fetch from the device aborts in the guest and leaves the host unharmed."""
    vm.guest.ping()
    with pytest.raises(GuestException):
        vm.guest.execute(GICC)
    assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0x0002_043B


# -- memslots at the same IPA --------------------------------------------------------------------------------------
# No version refuses them. Once the mapping of the interface is gone, nothing maps it again (vgic_ready).


@pytest.fixture(params=["before the first run", "after it"])
def covered(request, vm, vgic):
    """A memslot of RAM that covers the CPU interface."""
    if request.param == "after it":
        vm.guest.ping()
    return vm.add_memory(GICC & -BLOCK, BLOCK)


def test_a_memslot_does_not_hide_it(vm, covered, stage2, host):
    assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0x0002_043B
    assert mapped(stage2, vm) == pages(host)
    assert covered.read(GICC % BLOCK, 4) == bytes(4)


def test_deleting_the_memslot_takes_it_away(vm, covered, stage2, host):
    """The guest's next access exits to user space, or is emulated by KVM where it traps GICC_DIR."""
    vm.guest.ping()
    vm.delete_slot(GICC)
    assert mapped(stage2, vm) == []
    vm.guest.read(GICC + gicv2.GICC_IIDR)
    assert vm.exits == ([] if traps_dir(host) else [Mmio(ipa=GICC + gicv2.GICC_IIDR, size=4, write=False)])


def test_dropping_the_memslots_pages_takes_it_away(vm, covered, stage2):
    """The notifier unmaps the IPA, whatever is mapped there; then the guest sees the memslot's RAM."""
    vm.guest.ping()
    covered.advise(Advice.DONTNEED)
    assert mapped(stage2, vm) == []
    assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0
    assert stage2(vm).leaf(GICC).pa == covered.frame(GICC % BLOCK)


def test_fork_takes_it_away_with_the_memslots_pages(vm, covered, stage2, host):
    covered.write(0, b"x")  # fork does not copy a private mapping that has no pages of its own
    vm.guest.ping()
    Child(host.agent).end()
    assert mapped(stage2, vm) == []


def test_unmapped_memory_elsewhere_leaves_it_alone(vm, vgic, stage2, host):
    memory = vm.add_memory(GICC - BLOCK, BLOCK - 0x2000)
    vm.guest.fill(GICC - BLOCK, 16)
    memory.advise(Advice.DONTNEED)
    vm.delete_slot(GICC - BLOCK)
    assert mapped(stage2, vm) == pages(host)
    assert vm.guest.read(GICC + gicv2.GICC_IIDR) == 0x0002_043B


def test_dirty_logging_of_the_memslot(vm, covered, stage2, host, known_fault):
    """Write protection reaches the interface's leaves too; the guest's next store must still get through."""
    vm.guest.ping()
    vm.set_flags(GICC & -BLOCK, SlotFlags.LOG_DIRTY_PAGES)
    assert mapped(stage2, vm) == pages(host)
    assert not any(stage2(vm).leaf(ipa).writable for ipa in mapped(stage2, vm))
    vm.guest.write(GICC + gicv2.GICC_PMR, 0xFF)
    still_the_device = host.kernel_version >= (5, 10)  # before, the store's fault maps the memslot's RAM
    assert vm.guest.read(GICC + gicv2.GICC_PMR) == (0xF8 if still_the_device else 0xFF)
    try:
        stage2(vm)
    except Violation as e:
        executable = e.verdicts == {Verdict.EXCESS_PERMISSION} and [finding.ipa for finding in e.findings] == [GICC]
        if not executable or not host.needs_no_icache_maintenance:
            raise
        vm.destroy()
        known_fault("executable-cpu-interface")


def test_vm_that_never_ran(vm, vgic):
    """The interface was never mapped, so destroying the VM has nothing to unmap."""
    vm.destroy()


def test_no_vgic_no_mapping(vm, stage2):
    vm.guest.read(GICC + gicv2.GICC_IIDR)
    assert vm.exits == [Mmio(ipa=GICC + gicv2.GICC_IIDR, size=4, write=False)]
    assert mapped(stage2, vm) == []
