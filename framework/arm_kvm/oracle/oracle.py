"""The oracle of one host: with the machine stopped, it reads stage 2 and the host's own mapping, and judges them."""

from __future__ import annotations

import time
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

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
    """A snapshot taken with all CPUs stopped: the requested VMs' cases, by VM name, and every VM's tables."""

    cases: dict[str, judge.Case]
    tables: dict[str, Tables]

    def judged(self) -> list[tuple[Stage2, list[Finding]]]:
        """Return the tables of each requested VM and all that is wrong with them."""
        shared = judge.shared_tables(self.tables)
        return [(Stage2(case.tables), case.findings() + shared[name]) for name, case in self.cases.items()]

    @property
    def frames(self) -> tuple[int, ...]:
        """The host's PAs of the requested HVAs, 0 where the host maps nothing."""
        return tuple(next(iter(self.cases.values())).view.others.tolist())


class Oracle:
    """Judges the VMs of one host. All methods may be called while guests run."""

    def __init__(self, host: Host) -> None:
        self._host = weakref.proxy(host)  # the host owns the oracle
        self._ram = host.machine.ram
        self.locator = Locator(self._host)  #: finds the roots of VMs and VMM processes
        self._writable = host.config.architecture.linux_writable

    def stage2(self, vm: Vm) -> Stage2:
        """Return the VM's tables, after they were judged. Raises Violation with the diff."""
        stage2, findings = self.examine(vm)[0]
        if findings:
            raise Violation(f"{vm.name}: {stage2.regime}", findings, self._context())
        return stage2

    def vmid(self, vm: Vm) -> int:
        """Return the VM's VMID, from VTTBR of a CPU that runs its guest."""
        return self.locator.sample(vm).vmid

    def examine(self, *vms: Vm) -> list[tuple[Stage2, list[Finding]]]:
        """Read the tables of these VMs at one time and find all that is wrong with them.

        Kernels before 6.10 map a changed page in stage 2 (change_pte) just before they set the host's own entry, which
        is empty until then. When there is such a leaf, the tables are read again.
        """
        for _ in range(_LOOKS):
            seen = self.look(*vms).judged()
            if not any(f.reason is Reason.HOST_HAS_NO_PAGE for _, found in seen for f in found):
                break
            time.sleep(_BETWEEN_LOOKS)
        return seen

    def look(self, *vms: Vm, hvas: NDArray[np.uint64] = judge.NOWHERE) -> Capture:
        """Read the tables of these VMs and the host's mapping of their pages at one time, to be judged later.

        ``hvas`` (uint64) are further HVAs of the first VM's process to translate, for :attr:`Capture.frames`.
        """
        for vm in vms:
            self.locator.stage2_regime(vm)
        spaces = [self.locator.vmm_space(vm.agent) for vm in vms]
        slots = [tuple(vm.slots.values()) for vm in vms]
        others = [hvas, *[judge.NOWHERE] * (len(vms) - 1)]
        views: list[judge.HostView] = []
        with self.locator.gdb.pause():
            regimes = {v.name: regime for v in self._host.vms if v.alive and (regime := self.locator.known(v))}
            tables = {name: sweep.sweep(regime, self._ram) for name, regime in regimes.items()}
            for vm, space, own, asked in zip(vms, spaces, slots, others, strict=True):
                translate = partial(sweep.translate, space, self._ram)
                views.append(judge.host_view(tables[vm.name].leaves, own, translate, asked))
        sides = zip(vms, slots, views, strict=True)
        return Capture({vm.name: self._case(vm, tables[vm.name], own, view) for vm, own, view in sides}, tables)

    def _case(self, vm: Vm, tables: Tables, slots: tuple[Memslot, ...], view: judge.HostView) -> judge.Case:
        page = np.uint64(0x1000)
        return judge.Case(
            tables=tables,
            slots=slots,
            windows=vm.windows,
            view=view,
            host_writable=self._writable(view.host_desc),
            written=vm.stores.pages(view.ipa, np.full(len(view.ipa), page)),
            ram=self._ram,
        )

    def splats(self) -> list[Finding]:
        """Return the findings in the host's kernel log since the last call."""
        return splats.find(self._host.agent(op.kernel_log))

    def _context(self) -> str:
        return "Last requests to the agent:\n  " + "\n  ".join(self._host.agent.recent)
