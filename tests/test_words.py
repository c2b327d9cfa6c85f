"""Ioctls, system calls and races without a method of their own: the examples in docs/how-to/any-system-call.md."""

import errno
import struct

import pytest
from arm_kvm.support.errors import ConfigError, HoldFailed, KernelError
from arm_kvm.vocabulary import (
    BLOCK,
    CODE,
    PAGE,
    Advice,
    File,
    GuestException,
    GuestStage1,
    HostOsError,
    Ioctl,
    Prot,
    RunFailed,
    SlotFlags,
    ioctls,
    op,
)

IPA = 0x8000_0000
pytestmark = pytest.mark.native


# -- ioctls ----------------------------------------------------------------------------------------------------


def test_ioctl_on_the_system(host):
    """KVM_CHECK_EXTENSION(KVM_CAP_NR_MEMSLOTS): an ioctl whose argument is a number."""
    assert host.kvm.ioctl(ioctls.KVM_CHECK_EXTENSION, 10) >= 32  # KVM_CAP_NR_MEMSLOTS


@pytest.mark.feature("nisv-to-user")
def test_capability_of_a_vm(vm):
    """KVM_ENABLE_CAP(KVM_CAP_ARM_NISV_TO_USER): accesses without a valid syndrome exit to user space from then on."""
    enable = struct.pack("<IIQQQQ64x", 177, 0, 0, 0, 0, 0)  # struct kvm_enable_cap
    vm.descriptor.exchange(ioctls.KVM_ENABLE_CAP, enable)
    with pytest.raises(RunFailed) as failed:
        vm.guest.read(IPA, insn="ldr-post")
    assert failed.value.exit.kind == "no-syndrome"


@pytest.mark.feature("inject-abort")
def test_events_of_a_vcpu(vm):
    """KVM_SET_VCPU_EVENTS makes an external abort pending, which the guest takes at its next instruction."""
    vm.guest.ping()
    events = struct.pack("<BBB5xQ48x", 0, 0, 1, 0)  # struct kvm_vcpu_events: ext_dabt_pending
    vm.vcpus[0].descriptor.exchange(ioctls.KVM_SET_VCPU_EVENTS, events)
    with pytest.raises(GuestException) as taken:
        vm.guest.ping()
    assert taken.value.kind == "data abort" and taken.value.external


@pytest.mark.feature("dirty-ring")
def test_dirty_ring(make_vm):
    """A dirty ring is enabled before vCPUs are created, mapped from the vCPU's descriptor, and read in VMM memory."""
    vm = make_vm(create_vcpus=False)
    enable = struct.pack("<IIQQQQ64x", 223, 0, 4 * PAGE, 0, 0, 0)  # KVM_CAP_DIRTY_LOG_RING_ACQ_REL, bytes of a ring
    vm.descriptor.exchange(ioctls.KVM_ENABLE_CAP, enable)
    vm.vcpus[0].create()
    ring = vm.memory(4 * PAGE, shared=True, file=vm.vcpus[0].descriptor, offset=64 * PAGE)  # KVM_DIRTY_LOG_PAGE_OFFSET
    vm.add_memory(IPA, 16 * PAGE, slot=5, flags=SlotFlags.LOG_DIRTY_PAGES)
    vm.guest.write(IPA + 3 * PAGE, 1)
    entries = struct.iter_unpack("<IIQ", ring.read(0, 4 * PAGE))  # struct kvm_dirty_gfn: flags, slot, offset
    assert [(slot, offset) for flags, slot, offset in entries if flags & 1] == [(5, 3)]
    assert vm.descriptor.ioctl(ioctls.KVM_RESET_DIRTY_RINGS) == 0, "nothing was harvested"


def test_vcpu_that_is_not_initialised(make_vm):
    """KVM_RUN fails before KVM_ARM_VCPU_INIT and succeeds after it."""
    vm = make_vm(create_vcpus=False)
    vm.vcpus[0].create(init=False)
    exit_ = vm.vcpus[0].run()
    assert (exit_.kind, exit_.errno) == ("error", errno.ENOEXEC)
    vm.vcpus[0].reset()
    vm.guest.ping()


def test_ioctl_that_fails_says_which(vm):
    with pytest.raises(HostOsError, match="KVM_NO_SUCH_IOCTL: EINVAL"):
        vm.descriptor.ioctl(Ioctl.none("KVM_NO_SUCH_IOCTL", 0xFE))


@pytest.mark.guests("A64", "A32")
def test_attribute_of_a_device(host, make_vgic, vm):
    """KVM_DEV_ARM_VGIC_GRP_NR_IRQS is set and read back."""
    vgic = make_vgic(vm)
    vgic.set_attribute(3, 0, 64)
    assert vgic.get_attribute(3, 0) & 0xFFFF_FFFF == 64


# -- system calls and memory -------------------------------------------------------------------------------------


def test_mapping_of_a_device(host, vm):
    """An unused virtio-mmio device of the board, mapped through /dev/mem at its PA, starts with a magic value."""
    slot = vm.memory(PAGE, shared=True, file=File.open(host.agent, "/dev/mem"), offset=0x0A00_0000, prot=Prot.READ)
    assert slot.read(0, 4) == b"virt"


def test_prctl(host, vm, stage2):
    """PR_SET_THP_DISABLE: no huge page is allocated, and no block is mapped, in spite of MADV_HUGEPAGE."""
    host.system_call("prctl", 41, 1, 0, 0, 0)
    memory = vm.memory(BLOCK, align=BLOCK)
    memory.advise(Advice.HUGEPAGE)
    vm.add_memory(IPA, BLOCK, memory=memory)
    vm.guest.write(IPA, 1)
    host.system_call("prctl", 41, 0, 0, 0, 0)
    assert not stage2(vm).leaf(IPA).is_block


@pytest.mark.feature("MADV_COLLAPSE")
def test_collapse(vm, stage2):
    """MADV_COLLAPSE makes a huge page at once, without khugepaged."""
    memory = vm.add_memory(IPA, BLOCK, align=BLOCK)
    vm.guest.fill(IPA, BLOCK // PAGE)
    assert not stage2(vm).leaf(IPA).is_block
    memory.advise(Advice.COLLAPSE)
    vm.guest.read(IPA)
    assert stage2(vm).leaf(IPA).is_block


@pytest.mark.needs("memory-failure")
def test_siginfo_of_a_signal(vm):
    """A guest accesses failed memory: SIGBUS interrupts KVM_RUN, and its siginfo has the HVA."""
    memory = vm.add_memory(IPA, 4 * PAGE)
    vm.guest.write(IPA + PAGE, 1)
    memory.advise(Advice.HWPOISON, PAGE, PAGE)
    with pytest.raises(RunFailed) as failed:
        vm.guest.read(IPA + PAGE)
    info = failed.value.exit.signal
    assert (info.number, info.code, info.address, info.lsb) == (7, 4, memory.hva + PAGE, 12)  # BUS_MCEERR_AR


@pytest.mark.isolation("test")
def test_pending_signals(host):
    """A signal that was sent to the VMM is pending until it is taken.

    It needs a host of its own: the signal is not blocked in threads that the VMM, for an actor, started before.
    """
    assert host.take_signals(12) == []
    host.ssh.run(f"kill -12 {host.agent.hello['pid']}")
    assert [info.number for info in host.take_signals(12)] == [12]


@pytest.mark.feature("PAGEMAP_SCAN")
def test_pages_written_since(host, vm):
    """PAGEMAP_SCAN finds the pages written since userfaultfd (WP_ASYNC) protected them, also those guests wrote."""
    memory = vm.add_memory(IPA, 16 * PAGE, align=BLOCK)
    vm.guest.fill(IPA, 16)
    faults = host.userfaultfd(0o2000000)  # O_CLOEXEC
    api = struct.pack("<QQQ", 0xAA, 1 << 15 | 1 << 13, 0)  # UFFD_FEATURE_WP_ASYNC, WP_UNPOPULATED
    faults.exchange(ioctls.UFFDIO_API, api)
    faults.exchange(ioctls.UFFDIO_REGISTER, struct.pack("<QQQQ", memory.hva, memory.size, 2, 0))
    faults.exchange(ioctls.UFFDIO_WRITEPROTECT, struct.pack("<QQQ", memory.hva, memory.size, 1))
    vm.guest.write(IPA + 5 * PAGE, 1)
    regions = vm.memory(PAGE)
    scan = struct.pack(
        "<12Q", 96, 0, memory.hva, memory.hva + memory.size, 0, regions.hva, 16, 0, 0, 2, 0, 2
    )  # struct pm_scan_arg: PAGE_IS_WRITTEN is 2
    File.open(host.agent, "/proc/self/pagemap").exchange(ioctls.PAGEMAP_SCAN, scan)
    start, end, _ = struct.unpack("<QQQ", regions.read(0, 24))
    assert (start, end) == (memory.hva + 5 * PAGE, memory.hva + 6 * PAGE)


# -- the guest -------------------------------------------------------------------------------------------------


def test_registers_after_an_exception(vm):
    """The guest's general registers when it took the exception; one of them holds the address of its branch."""
    vm.add_memory(IPA, PAGE, flags=SlotFlags.READONLY)
    with pytest.raises(GuestException) as taken:
        vm.guest.execute(IPA + BLOCK)
    registers = taken.value.registers
    assert registers[16 if vm.isa.name == "A64" else 12] == IPA + BLOCK
    assert len(registers) == (31 if vm.isa.name == "A64" else 13)


def test_access_flag_of_the_guests_own_tables(vm):
    """A leaf of the guest's own stage 1 without the access flag: the guest takes an access flag fault, level 1."""
    vm.add_memory(IPA, 16 * PAGE)
    stage1 = GuestStage1(vm.isa, root=IPA)
    stage1.map_block(3 << 30, IPA & -(1 << 30), af=False)
    vm.memories[-1].write(0, stage1.encode())
    vm.guest.enable_mmu(stage1)
    with pytest.raises(GuestException) as taken:
        vm.guest.read(3 << 30)
    assert taken.value.syndrome & 0x3F == 0b001001
    assert vm.guest.read(CODE) != 0, "the rest is still mapped"


# -- concurrency -------------------------------------------------------------------------------------------------


def test_actor(host, vm):
    """An actor and the agent's main thread work at the same time; a failure in the actor is raised by the job."""
    actor = host.actor()
    job = actor.begin(op.stay_in_user_mode, seconds=0.5)
    assert host.agent(op.hello) == host.agent.hello and not job.done()
    assert job.result() is None
    with pytest.raises(HostOsError, match="store to memory: EFAULT"):
        actor.begin(op.memory_write, hva=0x1000, blob=b"x").result()
    memory = vm.memory(PAGE)
    memory.write(0, b"read")
    assert actor.begin(op.memory_read, hva=memory.hva, size=4).result() == b"read"


def test_an_actor_ends_with_its_test(host):
    host.actor(cpu=1)
    count = f"ls /proc/{host.agent.hello['pid']}/task | wc -l"
    threads = int(host.ssh.run(count))
    host.reset()
    assert int(host.ssh.run(count)) == threads - 1


def test_held_cpu(host, vm):
    """CPU 1 is held in madvise(2) while CPU 0 goes on; the page is unmapped when CPU 1 is released."""
    memory = vm.memory(PAGE)
    memory.write(0, b"here")
    actor = host.actor(cpu=1)
    with host.hold("unmap_page_range", "__zap_vma_range", cpu=1) as held:
        job = actor.begin(op.memory_advise, hva=memory.hva, size=PAGE, advice=Advice.DONTNEED)
        held.wait()
        assert memory.read(0, 4) == b"here" and not job.done(0.2)
    job.result()
    assert memory.read(0, 4) == bytes(4)


def test_other_cpus_are_not_held(host, vm):
    memory = vm.memory(PAGE)
    with host.hold("unmap_page_range", "__zap_vma_range", cpu=1) as held:
        for _ in range(5):  # on CPU 0
            memory.write(0, b"here")
            memory.advise(Advice.DONTNEED)
        assert not held.reached


def test_cpu_that_does_not_reach_the_symbol(host):
    with (
        host.hold("unmap_page_range", "__zap_vma_range", cpu=1) as held,
        pytest.raises(HoldFailed, match="did not reach unmap_page"),
    ):
        held.wait(seconds=0.5)


def test_cpu_that_is_held_for_too_long(host, vm):
    memory = vm.memory(PAGE)
    memory.write(0, b"here")
    actor = host.actor(cpu=1)
    too_long = pytest.raises(HoldFailed, match="held at unmap_page_range for 1 s")
    with too_long, host.hold("unmap_page_range", "__zap_vma_range", cpu=1, seconds=1.0) as held:
        job = actor.begin(op.memory_advise, hva=memory.hva, size=PAGE, advice=Advice.DONTNEED)
        held.wait()
        job.result(seconds=5.0)  # the CPU has been released
    assert memory.read(0, 4) == bytes(4)


def test_cpu_0_and_unknown_symbols_cannot_be_held(host):
    with (
        pytest.raises(ConfigError, match="CPU 0 cannot be held"),
        host.hold("unmap_page_range", "__zap_vma_range", cpu=0),
    ):
        pass
    with pytest.raises(KernelError, match="no symbol no_such_function"), host.hold("no_such_function", cpu=1):
        pass
