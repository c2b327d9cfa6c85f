"""Find a VM's stage-2 root and a VMM's stage-1 root from outside the host, without asking the kernel.

A VM's root is in VTTBR while its guest runs, a process's root in TTBR0 while it is in user mode. A candidate is
accepted only if a walk from it leads to a known page: the VM's mailbox, or a page of the process with known content.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np

from arm_kvm.guest.payload import MAILBOX
from arm_kvm.host.host import Host
from arm_kvm.host.origin import Once, Origin
from arm_kvm.machine.gdb import Gdb
from arm_kvm.machine.machine import connect_gdb
from arm_kvm.machine.ram import Ram
from arm_kvm.machine.rundir import Card
from arm_kvm.model.arch import sweep
from arm_kvm.model.arch.regime import ARMV7, ARMV8, HCR_E2H, HCR_VM, Architecture, ImpossibleRegime, Regime
from arm_kvm.oracle.stage2 import Stage2
from arm_kvm.support.errors import MachineError, NoLiveMachine
from arm_kvm.vmm.client import Agent, op, request
from arm_kvm.vmm.vm import Vm

_PATIENCE = 20.0  #: seconds; mostly the first try succeeds, but this machine may be loaded
_BETWEEN_LOOKS = 0.001  #: seconds between stops of the machine, in which it can go on
_LOOKS = 10  #: for each request to stay in user mode or in the guest
_USER_MODE = 0.02  #: seconds of the first request to the agent to stay in user mode
_ROUNDS = 1 << 20  #: rounds of the first loop in a guest: some 5 ms
#: For the hosts of one snapshot: stage 2 of VMs of default IPA size.
_USUAL: WeakKeyDictionary[Origin, Regime] = WeakKeyDictionary()


def _until_found(look: Callable[[], Regime | None], what: str) -> Regime:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(_BETWEEN_LOOKS)
    raise MachineError(f"no CPU's registers pointed to the tables of {what} within {_PATIENCE:.0f} s")


def _found_while(
    busy: Callable[[int], AbstractContextManager[None]], look: Callable[[], Regime | None], what: str
) -> Regime:
    """Call ``look`` while ``busy(factor)`` keeps the guest in the CPU, or the process in user mode.

    On a loaded machine that is not reached at once, so ``factor`` grows from 1 to 64 times the usual duration, and with
    it the time between looks, in which the machine can go on.
    """
    lengths = (min(1 << attempt, 64) for attempt in itertools.count())

    def looks() -> Regime | None:
        longer = next(lengths)
        with busy(longer):
            for _ in range(_LOOKS):
                time.sleep(_BETWEEN_LOOKS * longer)
                if (found := look()) is not None:
                    return found
        return None

    return _until_found(looks, what)


@contextmanager
def _in_user_mode(agent: Agent, seconds: float) -> Iterator[None]:
    """Make the agent loop in user mode for ``seconds``, and wait for its end after the block."""
    number = agent.send(request(op.stay_in_user_mode, seconds=seconds))
    try:
        yield
    finally:
        agent.receive(number)


def guests_on_cpus(gdb: Gdb, arch: Architecture) -> list[Regime]:
    """Decode the stage-2 regimes of the stopped CPUs that are in a guest: HCR.VM set and VTTBR not 0."""
    found = []
    features = arch.features(*gdb.read(0, *arch.identity))
    for cpu in range(len(gdb.threads)):
        hcr, vttbr, vtcr = gdb.read(cpu, arch.hcr, arch.vttbr, arch.vtcr)
        if hcr & HCR_VM and vttbr:
            try:
                found.append(arch.stage2(vttbr, vtcr, hcr, features))
            except ImpossibleRegime as e:
                raise MachineError(f"CPU {cpu} runs a guest with a stage 2 that the model does not cover: {e}") from e
    return found


def _user_spaces(gdb: Gdb, arch: Architecture) -> list[Regime]:
    """Decode the stage-1 regimes of user space that are loaded on the stopped CPUs."""
    found = []
    for cpu in range(len(gdb.threads)):
        names = ("TTBR0", "TTBCR")
        if arch.name == "armv8":
            vhe = gdb.read(cpu, arch.hcr)[0] & HCR_E2H
            names = ("TTBR0_EL2", "TCR_EL2") if vhe else ("TTBR0_EL1", "TCR_EL1")
        try:
            found.append(arch.stage1(*gdb.read(cpu, *names)))
        except ImpossibleRegime:
            continue  # this CPU's TTBR0 is not set up
    return found


class Locator:
    """Finds and remembers the roots of one host's VMM processes and VMs."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._arch = host.config.architecture
        self._ram = host.machine.ram
        self._spaces: dict[int, Regime] = {}  # by the agent's pid
        self._regimes: WeakKeyDictionary[Vm, Regime] = WeakKeyDictionary()

    @property
    def gdb(self) -> Gdb:
        return self._host.machine.gdb

    def vmm_space(self, agent: Agent) -> Regime:
        """Return the stage-1 regime of a VMM process, which is found once. Raises MachineError."""
        if agent.from_boot:  # its tables are restored with the host
            return _first_space(self._host)
        pid = agent.hello["pid"]
        if pid not in self._spaces:
            self._spaces[pid] = self.find_vmm_space(agent)
        return self._spaces[pid]

    def find_vmm_space(self, agent: Agent) -> Regime:
        """Find the stage-1 regime of a VMM process: the one in which a page of it has the content just written."""
        cookie = os.urandom(16)
        hva = agent(op.memory_map, size=0x1000)
        agent(op.memory_write, hva=hva, blob=cookie)

        def look() -> Regime | None:
            with self.gdb.pause():
                return next((s for s in _user_spaces(self.gdb, self._arch) if self._holds(s, hva, cookie)), None)

        try:
            return _found_while(
                lambda longer: _in_user_mode(agent, _USER_MODE * longer), look, "the agent's address space"
            )
        finally:
            agent(op.memory_unmap, hva=hva, size=0x1000)

    def _holds(self, space: Regime, address: int, content: bytes) -> bool:
        _, pa = sweep.translate(space, self._ram, np.array([address], dtype=np.uint64))
        return bool(self._ram.backed(pa)[0]) and self._ram.read(int(pa[0]), len(content)) == content

    def stage2_regime(self, vm: Vm) -> Regime:
        """Return the VM's stage-2 regime, which is found once: its VMID may change, but not its root.

        Raises MachineError.
        """
        if vm not in self._regimes:
            self._regimes[vm] = self.sample(vm)
            if vm.ipa_bits == 0:
                _USUAL[self._host.origin] = self._regimes[vm]
        return self._regimes[vm]

    def known(self, vm: Vm) -> Regime | None:
        """Return the VM's stage-2 regime if it has been found, else None."""
        return self._regimes.get(vm)

    def adopt(self, vm: Vm, root: int) -> None:
        """Set the VM's root. The rest of its regime is taken from another VM of default IPA size, if one was found."""
        usual = _USUAL.get(self._host.origin)
        if vm not in self._regimes and usual is not None and vm.ipa_bits == 0:
            self._regimes[vm] = replace(usual, root=root)

    def sample(self, vm: Vm) -> Regime:
        """Read the VM's stage-2 regime, with its VMID, from the registers of a CPU that runs its guest.

        Raises MachineError when that is not found in time.
        """
        space = self.vmm_space(vm.agent)
        hva = np.array([vm.mailboxes.hva], dtype=np.uint64)

        def look() -> Regime | None:
            with self.gdb.pause():
                _, mailbox = sweep.translate(space, self._ram, hva)
                for regime in guests_on_cpus(self.gdb, self._arch):
                    _, pa = sweep.translate(regime, self._ram, np.array([MAILBOX], dtype=np.uint64))
                    if pa[0] and pa[0] == mailbox[0]:
                        return regime
            return None

        if any(guest.running for guest in vm.guests):
            return _until_found(look, f"VM {vm.id}")
        return _found_while(lambda longer: vm.guest.spinning_for(_ROUNDS * longer), look, f"VM {vm.id}")


#: Stage 1 of the agent that starts with the host: all hosts of one snapshot have the same.
_first_space: Once[Host, Regime] = Once(lambda host: Locator(host).find_vmm_space(host.agent))


def watch(card: Card, seconds: float) -> list[Stage2]:
    """Read the tables of every guest that a CPU of a live machine runs within ``seconds``, each once.

    Raises NoLiveMachine when the machine has ended, MachineError when its gdbstub is in use, as by tests.
    """
    arch = {a.name: a for a in (ARMV7, ARMV8)}[card.architecture]
    try:
        ram = Ram(os.open(card.ram, os.O_RDONLY), card.ram_start, card.ram_base, card.ram_size)
    except OSError as e:
        raise NoLiveMachine(f"the machine of host {card.host} has just ended: {e.strerror}") from e
    gdb = connect_gdb(Path(card.gdb), timeout=5.0)
    gdb.resume()
    found: dict[int, Stage2] = {}
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            with gdb.pause():
                for regime in guests_on_cpus(gdb, arch):
                    found[regime.root] = Stage2(sweep.sweep(regime, ram))
            time.sleep(0.01)
    finally:
        gdb.close()
        ram.close()
    return list(found.values())
