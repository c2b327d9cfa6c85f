"""Every rule of VMIDs and TLB maintenance, violated on a real host and reported under its name.

There are two ways to violate one. A function of the running kernel is made to return at once, by overwriting its first
instruction through the gdbstub; or the value that is about to be written to VTTBR is changed in the CPU's registers.
The recorder is not involved: the trace shows what the CPUs then do.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from arm_kvm.events.trace import root_of
from arm_kvm.events.violations import TraceRule
from arm_kvm.guest.isa import GuestException
from arm_kvm.model.kvm.memslots import SlotFlags
from arm_kvm.recorder.points import What
from arm_kvm.vmm.fleet import Fleet
from arm_kvm.vmm.memory import Advice

IPA = 0x8000_0000
VMID_SHIFT = 48

pytestmark = pytest.mark.native


@pytest.fixture
def enter_under(host, recorder):
    """``enter_under(vm, change)``: the next entry of the VM (vCPU ``index``, on CPU ``on``) has ``change(VTTBR)``."""
    gdb = host.machine.gdb
    register = "x" if host.config.architecture.name == "armv8" else "r"
    switch = {p.va: p for p in recorder.points if p.what is What.VTTBR and "vcpu_run" in p.function}

    def entry_changed(change, on):
        """Handle one stop. Returns whether it was the switch to a guest, on CPU ``on`` if not None, and was changed."""
        with gdb.stopped_at_breakpoint(5.0) as cpu:
            assert cpu is not None, "no entry"
            (pc,) = gdb.read(cpu, "pc")
            point = switch[pc]
            names = [f"{register}{n}" for n in point.registers if register == "r" or n != 31]
            vttbr = sum(value << 32 * half for half, value in enumerate(gdb.read(cpu, *names)))
            done = root_of(vttbr) != 0 and on in (None, cpu)  # 0: the switch back to the host
            if done:
                for half, name in enumerate(names):
                    gdb.write(cpu, name, change(vttbr) >> 32 * half & (0xFFFF_FFFF if register == "r" else -1))
            gdb.step(cpu)
            return done

    def serve(change, on):
        try:
            while not entry_changed(change, on):
                pass
        finally:
            with gdb.pause():
                for va in switch:
                    gdb.remove_breakpoint(va)

    def enter(vm, change, index=0, on=None):
        with gdb.pause():
            for va in switch:
                gdb.insert_breakpoint(va)
        with ThreadPoolExecutor(1) as pool:  # the agent cannot answer while the machine is stopped at a breakpoint
            served = pool.submit(serve, change, on)
            vm.guests[index].start_fill(IPA + 0x1000 * index, 1)
            served.result()
        with suppress(GuestException):  # with another VM's tables or VMID, the guest may take any exception
            vm.guests[index].finish()

    return enter


#: The functions that invalidate TLB entries of one VM; newer kernels have the last.
FLUSHES = ("__kvm_tlb_flush_vmid_ipa", "__kvm_tlb_flush_vmid", "__kvm_tlb_flush_vmid_range")


def kinds(run):
    return {violation.rule for violation in run.violations}


def number(vmid):
    """Return a function that replaces the VMID in a VTTBR."""
    return lambda vttbr: (vttbr & ((1 << VMID_SHIFT) - 1)) | vmid << VMID_SHIFT


def running(make_vms, count):
    """Create VMs with two pages of memory each at IPA, and run each once."""
    fleet = Fleet(make_vms(count))
    fleet.add_memory(IPA, 0x2000)
    fleet.ping()
    return fleet.vms


# -- the tables ----------------------------------------------------------------------------------------------


def test_healthy_host_breaks_no_rule(make_vms, record, enter_under):
    """What the other cases do, without a violation."""
    with record() as run:
        (vm,) = running(make_vms, 1)
        vm.guest.write(IPA, 1)
        vm.memories[-1].advise(Advice.DONTNEED)
        enter_under(vm, lambda vttbr: vttbr)
        vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
        vm.guest.ping()
    assert kinds(run) == set()


def test_unmap_without_invalidation(make_vms, record, without):
    """The host unmaps a page, and the TLBs are not invalidated."""
    with record(judge=False) as run:
        (vm,) = running(make_vms, 1)
        vm.guest.write(IPA, 1)
        with without(*FLUSHES):
            vm.memories[-1].advise(Advice.DONTNEED)
            vm.memories[-1].read(0x1000, 4)
            vm.guest.ping()
            vm.guest.ping()
    assert kinds(run) == {TraceRule.NOT_INVALIDATED}


def test_remap_without_invalidation(make_vms, record, without):
    """The page is unmapped and the guest gets another one: the TLBs may hold two frames for one IPA."""
    with record(judge=False) as run:
        (vm,) = running(make_vms, 1)
        vm.guest.write(IPA, 1)
        with without(*FLUSHES):
            vm.memories[-1].advise(Advice.DONTNEED)
            vm.guest.write(IPA, 2)
    assert TraceRule.BREAK_BEFORE_MAKE in kinds(run)


def test_write_protection_without_invalidation(make_vms, record, without):
    """Dirty logging write-protects the page; a TLB may still permit the guest to write, which the log would miss."""
    with record(judge=False) as run:
        (vm,) = running(make_vms, 1)
        vm.guest.write(IPA, 1)
        with without(*FLUSHES):
            vm.set_flags(IPA, SlotFlags.LOG_DIRTY_PAGES)
            vm.guest.ping()
            vm.guest.ping()
    assert kinds(run) == {TraceRule.NOT_INVALIDATED}


# -- VMIDs -----------------------------------------------------------------------------------------------------


def test_entered_with_vmid_0(make_vms, record, enter_under):
    """VMID 0 is the host's own."""
    with record(judge=False) as run:
        (vm,) = running(make_vms, 1)
        enter_under(vm, number(0))
    assert TraceRule.VMID_ZERO in kinds(run)


def test_two_vms_with_one_vmid(make_vms, record, vmid, enter_under):
    """The second VM is entered with the first one's VMID, at its first run."""
    with record(judge=False) as run:
        one, two = make_vms(2)
        two.add_memory(IPA, 0x1000)
        one.guest.ping()
        enter_under(two, number(vmid(one)))
    assert TraceRule.VMID_SHARED in kinds(run)


def test_vmid_of_a_destroyed_vm_is_reused(make_vms, record, vmid, enter_under):
    """The destroyed VM's translations may still be in the TLBs, which were not invalidated."""
    with record(judge=False) as run:
        one, two = make_vms(2)
        two.add_memory(IPA, 0x1000)
        one.guest.ping()
        old = vmid(one)
        one.destroy()
        enter_under(two, number(old))
    assert TraceRule.VMID_REUSED in kinds(run)


@pytest.mark.needs("a15")
@pytest.mark.parametrize("destroyed", [False, True])
def test_counter_held_still(host, recorder, make_vms, record, destroyed):
    """The kernel's VMID counter is set back to the value before the second VM took its VMID from it."""
    counter = recorder.kernel.pa(recorder.kernel.symbols["kvm_next_vmid"])
    with record(judge=False) as run:
        one, two, three = make_vms(3)
        one.guest.ping()
        before = host.machine.ram.read(counter, 4)
        two.guest.ping()
        if destroyed:
            two.destroy()
        with host.machine.gdb.pause() as gdb:
            gdb.write_memory(counter, before)
        three.guest.ping()
    assert (TraceRule.VMID_REUSED if destroyed else TraceRule.VMID_SHARED) in kinds(run)


def test_two_vcpus_with_different_vmids(make_vm, record, vmid, enter_under):
    """vCPU 0 is in the guest on CPU 1; vCPU 1 is entered on CPU 0 with the next VMID."""
    with record(judge=False) as run:
        vm = make_vm(vcpus=2)
        vm.add_memory(IPA, 0x2000)
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.pin(1 - index)
            vm.guests[index].ping()
        with vm.guest.spinning():
            enter_under(vm, number(vmid(vm) + 1), index=1, on=0)
    assert TraceRule.VMID_SPLIT in kinds(run)


@pytest.mark.needs("vmid8")
@pytest.mark.isolation("test")
def test_rollover_without_invalidation(make_vms, record, without):
    """A new generation begins, and the TLBs still hold the old one's translations.

    It needs a host of its own. If VMs of earlier cases keep the last VMIDs of a generation, it ends before 255, and the
    trace shows only that VMIDs are assigned twice.
    """
    with record(judge=False) as run, without("__kvm_flush_vm_context"):
        running(make_vms, 300)
    assert TraceRule.ROLLOVER_NOT_INVALIDATED in kinds(run)


@pytest.mark.needs("vmid8")
def test_vmid_of_an_old_generation(make_vms, record, enter_under):
    """A VM that did not run since the rollover is entered with its old VMID, which is another VM's now."""
    with record(judge=False) as run:
        vms = running(make_vms, 300)
        Fleet(vms).ping()
        run.look()
        last = {run.vmids(vm)[-1]: vm for vm in vms}  # by VMID, the VM that got it last; others did not run since then
        sleeper = next(vm for vm in vms if run.entered_last(vm) < run.entered_last(last[run.vmids(vm)[-1]]))
        enter_under(sleeper, number(run.vmids(sleeper)[-1]))
    assert TraceRule.OLD_GENERATION in kinds(run)


@pytest.mark.needs("vmid8")
def test_not_the_next_vmid(make_vms, record, enter_under):
    """250, early in a generation: no VM has this VMID, but the allocator would not choose it."""
    with record(judge=False) as run:
        running(make_vms, 300)
        run.look()
        assert not set(run.first_runs[-45:]) & {250}
        (late,) = make_vms(1)
        late.add_memory(IPA, 0x1000)
        enter_under(late, number(250))
    assert TraceRule.WRONG_VMID in kinds(run)


# -- roots and CPUs ----------------------------------------------------------------------------------------------


def test_root_of_a_destroyed_vm(make_vms, record, enter_under):
    """VTTBR points to memory that was a table before."""
    with record(judge=False) as run:
        one, two = running(make_vms, 2)
        run.look()
        root = run.root(one)
        one.destroy()
        enter_under(two, lambda vttbr: vttbr >> VMID_SHIFT << VMID_SHIFT | root)
    assert TraceRule.STALE_VTTBR in kinds(run)


def test_vcpus_share_a_cpu_without_local_flush(make_vm, record, without):
    """vCPU 1 is entered on the CPU where vCPU 0 ran last, whose TLB may hold vCPU 0's translations."""
    with record(judge=False) as run:
        vm = make_vm(vcpus=2)
        with without("__kvm_flush_cpu_context"):
            for index, vcpu in enumerate(vm.vcpus):
                vcpu.pin(0)
                vm.guests[index].ping()
    assert kinds(run) == {TraceRule.NO_LOCAL_FLUSH}
