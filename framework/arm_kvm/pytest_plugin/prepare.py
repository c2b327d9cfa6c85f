"""Prepares what the next tests begin with, while the current one runs.

A test that has a host for itself finds it restored, with the VM that its ``vm`` fixture asks for. Both take time: a
QEMU that has just started translates all code for the first time, and the first VM of a host runs some 9,000 blocks of
it. Nothing is done to such a host that the test would not do first itself.
"""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

import pytest

from arm_kvm.host.host import Host
from arm_kvm.hosts.pool import Expected, MakePlugin
from arm_kvm.hosts.spares import SPARES
from arm_kvm.pytest_plugin.selection import after, fixtures_of, host_name, owner_of, parameters_of, records
from arm_kvm.pytest_plugin.stash import POOL
from arm_kvm.recorder.probe import Probe
from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm

#: VMs created for the ``vm`` fixture of a test still to come.
_PREPARED: WeakKeyDictionary[Host, Vm] = WeakKeyDictionary()
#: The fixture behind our ``vm``. A case uses it exactly if it uses our ``vm``, and not one that overrides it.
OUR_VM = "_lab_vm"


def plugin_for(item: pytest.Item) -> MakePlugin | None:
    """Return the TCG plugin to load into the QEMU of this case's host."""
    return Probe if records(item) and with_probe(item.config) else None


def with_probe(config: pytest.Config) -> bool:
    recorder: str = config.getoption("--recorder")
    return recorder == "probe"


def expect_next(item: pytest.Item) -> None:
    """Have the hosts of the next tests made while this one runs."""
    coming = ((test, host_name(test)) for test in after(item, SPARES))
    item.config.stash[POOL].expect(
        Expected(owner_of(test), name, plugin_for(test), partial(_furnish, test))
        for test, name in coming
        if name is not None and owner_of(test).alone
    )


def _furnish(item: pytest.Item, host: Host) -> None:
    """Connect to the host as the test will, and create its VM."""
    with host.machine.gdb.pause() as gdb:  # connects
        gdb.read(0, *host.config.architecture.identity)  # learns the registers' names
    host.agent(op.kernel_log)  # discard what the kernel logged when it was restored
    if "ssh" in fixtures_of(item):
        _ = host.ssh
    if host.has_kvm and OUR_VM in fixtures_of(item):
        _PREPARED[host] = first_vm(item, host)


def first_vm(item: pytest.Item, host: Host) -> Vm:
    """Return the VM for the ``vm`` fixture of this case: the prepared one, or a new one."""
    if (prepared := _PREPARED.pop(host, None)) is not None:
        return prepared
    mark = item.get_closest_marker("vcpus")
    vm = host.create_vm(parameters_of(item)["isa"], vcpus=mark.args[0] if mark else 1)
    if mark and mark.kwargs.get("pinned", False):
        for index, vcpu in enumerate(vm.vcpus):
            vcpu.pin(index % host.config.board.cpus)
    return vm
