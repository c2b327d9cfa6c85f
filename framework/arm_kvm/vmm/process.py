"""Further VMM processes in a host: agents that can be killed, with their VMs."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from arm_kvm.guest.isa import ISAS
from arm_kvm.support.errors import AgentTimeout, LabError
from arm_kvm.vmm.client import Agent, op
from arm_kvm.vmm.vm import Vm

_PATIENCE = 10.0


class Vmm:
    """A further VMM process in a host. While it lives, its VMs are judged like the host's others."""

    def __init__(self, agent: Agent, first: Agent, vms: list[Vm]) -> None:
        """``agent`` is this VMM, ``first`` the host's first agent, ``vms`` the list of all VMs of the host."""
        self.agent = agent
        self.pid: int = agent.hello["pid"]
        agent.suffix = f" of process {self.pid}"
        self.vms: list[Vm] = []
        self._first, self._all = first, vms

    def create_vm(self, isa: str, **kind: Any) -> Vm:
        """Create a VM in this process; ``kind`` as for :meth:`arm_kvm.host.host.Host.create_vm`."""
        (vm,) = Vm.create(self.agent, ISAS[isa], 1, **kind)
        self.vms.append(vm)
        self._all.append(vm)
        return vm

    @property
    def alive(self) -> bool:
        """Whether the process exists."""
        return self._first(op.process_alive, pid=self.pid)

    def await_end(self) -> None:
        """Wait until the process has ended. Raises AgentTimeout when it does not end."""
        deadline = time.monotonic() + _PATIENCE
        while self.alive:
            if time.monotonic() > deadline:
                raise AgentTimeout(f"the VMM (pid {self.pid}) does not end", remedy="see the console for a hung task")
            time.sleep(0.02)
        self._forget()

    def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended. Raises AgentTimeout when it does not end."""
        self._first(op.process_kill, pid=self.pid)
        self.await_end()

    def _forget(self) -> None:
        for vm in self.vms:
            vm.alive = False
            if vm in self._all:
                self._all.remove(vm)
        self.agent.close()

    def end(self) -> None:
        """Kill the process if it still exists."""
        with suppress(LabError):
            if self.alive:
                self.kill()
