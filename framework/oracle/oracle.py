"""The oracle of one host: stop the machine, read both sides at the same moment, judge, go on."""

from __future__ import annotations

import time
import weakref

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
        self._sight = Sight(self._host)
        self._writable = host.config.architecture.linux_writable

    def stage2(self, vm: Vm) -> Stage2:
        """The VM's tables now, after safety was checked. Raises Violation with the diff."""
        stage2, findings = self.examine(vm)
        if findings:
            raise Violation(f"stage 2 of VM {vm.id}: {stage2.regime}", findings, self._context())
        return stage2

    def examine(self, vm: Vm) -> tuple[Stage2, list[Finding]]:
        """The VM's tables now, and all that is wrong with them.

        Kernels before 6.10 put a changed page into stage 2 (change_pte) an instant before the host's own
        entry, which is then empty: such a leaf is looked at again.
        """
        for _ in range(_LOOKS):
            stage2, findings = self._look(vm)
            if not any(f.kind is Kind.WRONG_FRAME and judge.NO_PAGE in f.expected for f in findings):
                break
            time.sleep(_BETWEEN_LOOKS)
        return stage2, findings

    def _look(self, vm: Vm) -> tuple[Stage2, list[Finding]]:
        self._sight.stage2_regime(vm)
        space = self._sight.vmm_space()
        slots = tuple(vm.slots.values())
        with self._sight.gdb.pause():
            tables = {v.name: sweep.sweep(v.regime, self._ram) for v in self._host.vms if v.alive and v.regime}
            own = tables[vm.name]
            view = judge.look(own.leaves, slots, lambda hvas: sweep.translate(space, self._ram, hvas))
        findings = self._case(vm, own, slots, view).findings() + judge.shared_tables(tables)[vm.name]
        return Stage2(own), findings

    def _case(self, vm: Vm, own: Tables, slots: tuple, view: judge.HostView) -> judge.Case:
        page = np.uint64(0x1000)
        return judge.Case(
            tables=own,
            slots=slots,
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
