"""The host boots as KVM needs it: in HYP mode or at EL2, with KVM initialised and all CPUs online.

The evidence is the kernel's boot log, /dev/kvm as a process on the host finds it, and the CPUs' registers as read from
outside the machine.
"""

import pytest
from arm_kvm.vocabulary import guests_on_cpus, selfchecks

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.needs("a15")
def test_a15_starts_in_hyp_mode(host):
    assert "All CPU(s) started in HYP mode" in selfchecks.kernel_log(host)


@pytest.mark.needs("arm64")
def test_arm64_starts_at_el2(host):
    assert "All CPU(s) started at EL2" in selfchecks.kernel_log(host)


def test_kvm_is_initialised(host):
    log = selfchecks.kernel_log(host)
    assert any(line in log for line in ("Hyp mode initialized", "Hyp nVHE mode initialized", "VHE mode initialized"))
    assert host.has_kvm


@pytest.mark.no_kvm
def test_hyp_mode_without_kvm(host):
    """Debian's armhf kernel is entered in HYP mode, but has no KVM."""
    assert "All CPU(s) started in HYP mode" in selfchecks.kernel_log(host)
    assert not host.has_kvm
    assert "Hyp mode initialized" not in selfchecks.kernel_log(host)


def test_all_cpus_are_online(host):
    assert host.agent.hello["cpus"] == host.config.board.cpus


def test_vm_that_never_ran_is_in_no_cpu(host, isa, make_vm):
    """A VM that never ran has its stage 2 loaded on no CPU: VTTBR is zero, or HCR.VM is clear."""
    make_vm()
    with host.machine.gdb.pause() as gdb:
        assert guests_on_cpus(gdb, host.config.architecture) == []
