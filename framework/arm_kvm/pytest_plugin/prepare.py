"""What a test begins with, made while those before it still run.

A test that has a host for itself finds it restored, and in it the VM that its ``vm`` fixture asks for: a QEMU that has
just been started translates all code for the first time, and the first VM of a host runs some 9,000 blocks of it.
Nothing is done to that host which the test would not do first itself.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import pytest

from arm_kvm.host.host import Host
from arm_kvm.hosts.pool import Expected, MakePlugin
from arm_kvm.hosts.spares import SPARES
from arm_kvm.pytest_plugin.selection import after, host_name, needs_host, owner_of, records
from arm_kvm.pytest_plugin.stash import POOL
from arm_kvm.recorder.probe import Probe
from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm

#: VMs that were made for the ``vm`` fixture of a test to come.
_PREPARED: WeakKeyDictionary[Host, Vm] = WeakKeyDictionary()
#: The fixture behind our ``vm``. A case that has it gets our VM; one with a ``vm`` of its own may do without.
OUR_VM = "_lab_vm"


def plugin_for(item: pytest.Item) -> MakePlugin | None:
    """What is loaded into the QEMU of the host that this case needs."""
    return Probe if records(item) and with_probe(item.config) else None


def with_probe(config: pytest.Config) -> bool:
    return config.getoption("--recorder") == "probe"


def expect_next(item: pytest.Item) -> None:
    """While this test runs, get ready what the next ones need."""
    coming = [test for test in after(item, SPARES) if needs_host(test) and owner_of(test).alone]
    item.config.stash[POOL].expect(
        Expected(owner_of(test), host_name(test), plugin_for(test), partial(_furnish, test)) for test in coming
    )


def _furnish(item: pytest.Item, host: Host) -> None:
    with host.machine.gdb.pause() as gdb:  # connected
        gdb.read(0, *host.config.architecture.identity)  # registers' names known
    host.agent(op.kernel_log)  # what it said when it was restored is nobody's
    if "ssh" in item.fixturenames:
        _ = host.ssh
    if host.has_kvm and OUR_VM in item.fixturenames:
        _PREPARED[host] = first_vm(item, host)


def first_vm(item: pytest.Item, host: Host) -> Vm:
    """The VM that the ``vm`` fixture gives this case: the one that is there, or a new one."""
    if (prepared := _PREPARED.pop(host, None)) is not None:
        return prepared
    mark = item.get_closest_marker("vcpus")
    vm = host.create_vm(item.callspec.params["isa"], vcpus=mark.args[0] if mark else 1)
    if mark and mark.kwargs.get("pinned", False):
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.pin(index % host.config.board.cpus)
    return vm
