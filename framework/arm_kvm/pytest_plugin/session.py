"""What the lab holds of one test: its host, its oracle and its artifacts."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from arm_kvm.host.host import Host
from arm_kvm.oracle import Oracle
from arm_kvm.oracle.verdicts import Finding
from arm_kvm.pytest_plugin.artifacts import TestFolder

_ORACLES: WeakKeyDictionary[Host, Oracle] = WeakKeyDictionary()
_DUMPED = 16  #: VMs of one test whose tables are all written down; of more VMs, only tables with findings


class HostSession:
    """One test on its host, from the fixture ``host`` to the judgement at the end."""

    def __init__(self, host: Host, folder: TestFolder, alone: bool) -> None:
        """``alone``: no other test uses this machine, so all of its logs belong to this one."""
        self.host = host
        self.alone = alone
        self.dead = False  #: whether a known fault took the host down
        first = host not in _ORACLES
        self.oracle = _ORACLES.setdefault(host, Oracle(host))  # keeps what it has learnt about the host
        self.folder = folder
        folder.begin(host.machine.logs, whole=alone)
        if first and not alone:
            self.oracle.splats()  # discard what the kernel logged before the first test

    def judge(self) -> list[Finding]:
        """Judge every VM of the test that has run, and the kernel's log."""
        findings = []
        vms = [vm for vm in self.host.vms if vm.alive and vm.entered]
        for vm, (stage2, found) in zip(vms, self.oracle.examine(*vms) if vms else [], strict=True):
            if found or len(vms) <= _DUMPED:
                self.folder.write(f"stage2-{vm.id}.txt", stage2.dump())
            findings += found
        return findings + self.oracle.splats()

    def destroy_vms(self) -> list[Finding]:
        """Destroy the test's VMs and return what the kernel complains of meanwhile. Raises LabError."""
        self.host.reset()
        return self.oracle.splats()
