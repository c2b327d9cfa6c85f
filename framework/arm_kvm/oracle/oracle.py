"""The oracle of one host: stop the machine, read both sides at the same moment, judge, go on."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np

from arm_kvm.host.host import Host
from arm_kvm.model.arch import sweep
from arm_kvm.model.arch.sweep import Tables
from arm_kvm.model.kvm.memslots import Memslot
from arm_kvm.oracle import judge, splats
from arm_kvm.oracle.locator import Locator
from arm_kvm.oracle.stage2 import Stage2
from arm_kvm.oracle.verdicts import Finding, Reason, Violation
from arm_kvm.vmm.client import op
from arm_kvm.vmm.vm import Vm

_LOOKS = 3
_BETWEEN_LOOKS = 0.01


@dataclass(frozen=True)
class Capture:
    """What was read of some VMs, by name, while the machine stood still, and of the tables of all: to be judged."""

    cases: dict[str, judge.Case]
    tables: dict[str, Tables]

    def judged(self) -> list[tuple[Stage2, list[Finding]]]:
        """Each VM's tables, and all that is wrong with them."""
        shared = judge.shared_tables(self.tables)
        return [(Stage2(case.tables), case.findings() + shared[name]) for name, case in self.cases.items()]

    @property
    def frames(self) -> tuple[int, ...]:
        """The host's frames for the HVAs that were asked for, physical addresses; 0: none."""
        return tuple(next(iter(self.cases.values())).view.others.tolist())


class Oracle:
    """Judges the VMs of one host. All methods may be called while guests run."""

    def __init__(self, host: Host) -> None:
        self._host = weakref.proxy(host)  # an oracle lives as long as its host
        self._ram = host.machine.ram
        self.locator = Locator(self._host)  #: finds roots and address spaces
        self._writable = host.config.architecture.linux_writable

    def stage2(self, vm: Vm) -> Stage2:
        """The VM's tables now, after safety was checked. Raises Violation with the diff."""
        stage2, findings = self.examine(vm)[0]
        if findings:
            raise Violation(f"stage 2 of VM {vm.id}: {stage2.regime}", findings, self._context())
        return stage2

    def vmid(self, vm: Vm) -> int:
        """The VMID in VTTBR, as sampled from a CPU's registers while the VM's guest is inside."""
        return self.locator.sample(vm).vmid

    def examine(self, *vms: Vm) -> list[tuple[Stage2, list[Finding]]]:
        """Each VM's tables now, all at one moment, and all that is wrong with them.

        Kernels before 6.10 put a changed page into stage 2 (change_pte) an instant before the host's own
        entry, which is then empty: such a leaf is looked at again.
        """
        for _ in range(_LOOKS):
            seen = self.look(*vms).judged()
            if not any(f.reason is Reason.HOST_HAS_NO_PAGE for _, found in seen for f in found):
                break
            time.sleep(_BETWEEN_LOOKS)
        return seen

    def look(self, *vms: Vm, hvas: np.ndarray = judge.NOWHERE) -> Capture:
        """Each VM's tables and the host's side of them, all at one moment, to be judged when there is time.

        So are the host's frames for ``hvas`` (uint64) of the first VM's process.
        """
        for vm in vms:
            self.locator.stage2_regime(vm)
        spaces = [self.locator.vmm_space(vm.agent) for vm in vms]
        slots = [tuple(vm.slots.values()) for vm in vms]
        others = [hvas, *[judge.NOWHERE] * (len(vms) - 1)]
        views = []
        with self.locator.gdb.pause():
            regimes = {v.name: regime for v in self._host.vms if v.alive and (regime := self.locator.known(v))}
            tables = {name: sweep.sweep(regime, self._ram) for name, regime in regimes.items()}
            for vm, space, own, asked in zip(vms, spaces, slots, others, strict=True):
                translate = partial(sweep.translate, space, self._ram)
                views.append(judge.look(tables[vm.name].leaves, own, translate, asked))
        cases = [self._case(vm, tables[vm.name], *side) for vm, *side in zip(vms, slots, views, strict=True)]
        return Capture({vm.name: case for vm, case in zip(vms, cases, strict=True)}, tables)

    def _case(self, vm: Vm, own: Tables, slots: tuple[Memslot, ...], view: judge.HostView) -> judge.Case:
        page = np.uint64(0x1000)
        return judge.Case(
            tables=own,
            slots=slots,
            windows=vm.windows,
            view=view,
            host_writable=self._writable(view.host_desc),
            written=vm.stores.pages(view.ipa, np.full(len(view.ipa), page)),
            ram=self._ram,
        )

    def splats(self) -> list[Finding]:
        """What the host's kernel complained about since this was last asked."""
        return splats.find(self._host.agent(op.kernel_log))

    def _context(self) -> str:
        return "Last requests to the agent:\n  " + "\n  ".join(self._host.agent.recent)
