"""The oracle of one host: stop the machine, read both sides at the same moment, judge, go on."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from functools import partial

import numpy as np

from framework.host.host import Host
from framework.host.vm import Vm
from framework.model import sweep
from framework.model.sweep import Tables

from . import judge, splats
from .sight import Sight
from .stage2 import Stage2
from .verdicts import Finding, Kind, Violation

_LOOKS = 3
_BETWEEN_LOOKS = 0.01


class Oracle:
    """Judges the VMs of one host. All methods may be called while guests run."""

    def __init__(self, host: Host) -> None:
        self._host = weakref.proxy(host)  # an oracle lives as long as its host
        self._ram = host.machine.ram
        self.sight = Sight(self._host)  #: finds roots and address spaces
        self._writable = host.config.architecture.linux_writable

    def stage2(self, vm: Vm) -> Stage2:
        """The VM's tables now, after safety was checked. Raises Violation with the diff."""
        stage2, findings = self.examine(vm)[0]
        if findings:
            raise Violation(f"stage 2 of VM {vm.id}: {stage2.regime}", findings, self._context())
        return stage2

    def vmid(self, vm: Vm) -> int:
        """The VMID in VTTBR, as sampled from a CPU's registers while the VM's guest is inside."""
        return self.sight.sample(vm).vmid

    def examine(self, *vms: Vm) -> list[tuple[Stage2, list[Finding]]]:
        """Each VM's tables now, all at one moment, and all that is wrong with them.

        Kernels before 6.10 put a changed page into stage 2 (change_pte) an instant before the host's own
        entry, which is then empty: such a leaf is looked at again.
        """
        for _ in range(_LOOKS):
            seen = self._look(vms)
            odd = [f for _, found in seen for f in found]
            if not any(f.kind is Kind.WRONG_FRAME and judge.NO_PAGE in f.expected for f in odd):
                break
            time.sleep(_BETWEEN_LOOKS)
        return seen

    def _look(self, vms: Sequence[Vm]) -> list[tuple[Stage2, list[Finding]]]:
        for vm in vms:
            self.sight.stage2_regime(vm)
        spaces = [self.sight.vmm_space(vm.agent) for vm in vms]
        slots = {vm.name: tuple(vm.slots.values()) for vm in vms}
        with self.sight.gdb.pause():
            tables = {v.name: sweep.sweep(v.regime, self._ram) for v in self._host.vms if v.alive and v.regime}
            views = {
                vm.name: judge.look(tables[vm.name].leaves, slots[vm.name], partial(sweep.translate, space, self._ram))
                for vm, space in zip(vms, spaces, strict=True)
            }
        shared = judge.shared_tables(tables)
        out = []
        for vm in vms:
            own = tables[vm.name]
            findings = self._case(vm, own, slots[vm.name], views[vm.name]).findings() + shared[vm.name]
            out.append((Stage2(own), findings))
        return out

    def _case(self, vm: Vm, own: Tables, slots: tuple, view: judge.HostView) -> judge.Case:
        page = np.uint64(0x1000)
        return judge.Case(
            tables=own,
            slots=slots,
            windows=vm.windows,
            view=view,
            host_writable=self._writable(view.host_desc),
            written=vm.written.pages(view.ipa, np.full(len(view.ipa), page)),
            ram=self._ram,
        )

    def splats(self) -> list[Finding]:
        """What the host's kernel complained about since this was last asked."""
        return splats.find(self._host.agent("kernel_log") or b"")

    def _context(self) -> str:
        return "Last requests to the agent:\n  " + "\n  ".join(self._host.agent.recent)
