"""The host comes up the way KVM needs it: in HYP mode or at EL2, with KVM initialised, and sees its CPUs.

What is read: the kernel's own words at boot, /dev/kvm as a process on the host finds it, and CPU
registers read from outside the machine.
"""

import pytest
from arm_kvm.host.selfchecks import kernel_log
from arm_kvm.oracle.locator import guests_on_cpus

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.needs("a15")
def test_a15_starts_in_hyp_mode(host):
    assert "All CPU(s) started in HYP mode" in kernel_log(host)


@pytest.mark.needs("arm64")
def test_arm64_starts_at_el2(host):
    assert "All CPU(s) started at EL2" in kernel_log(host)


def test_kvm_is_initialised(host):
    said = kernel_log(host)
    assert any(words in said for words in ("Hyp mode initialized", "Hyp nVHE mode initialized", "VHE mode initialized"))
    assert host.has_kvm


@pytest.mark.no_kvm
def test_hyp_mode_without_kvm(host):
    """Debian's armhf kernel starts in HYP mode, as the board lets it, and has no KVM."""
    assert "All CPU(s) started in HYP mode" in kernel_log(host)
    assert not host.has_kvm
    assert "Hyp mode initialized" not in kernel_log(host)


def test_all_cpus_are_online(host):
    assert host.agent.hello["cpus"] == host.config.board.cpus


def test_vm_that_never_ran_is_in_no_cpu(host, isa, make_vm):
    """A VM that never ran has no stage-2 regime in any CPU: VTTBR is clear, or VM is off."""
    make_vm()
    with host.machine.gdb.pause() as gdb:
        assert guests_on_cpus(gdb, host.config.architecture) == []
