"""The fixtures of test cases. ``pytest --fixtures`` prints their docstrings, the manual for authors of test cases."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import pytest
from _pytest.outcomes import Failed

from arm_kvm import known_faults
from arm_kvm.events.violations import ProtocolBroken
from arm_kvm.host import features
from arm_kvm.host.host import Host
from arm_kvm.host.ssh import Ssh
from arm_kvm.hosts.pool import HostBroken, Pool
from arm_kvm.oracle import Oracle
from arm_kvm.oracle import ftrace as trace_
from arm_kvm.oracle.stage2 import Stage2
from arm_kvm.oracle.witness import Witness
from arm_kvm.pytest_plugin.artifacts import TestFolder
from arm_kvm.pytest_plugin.failures import ContractBroken, HostLost, HostUnusable, KnownDeath, VmsLeft
from arm_kvm.pytest_plugin.prepare import OUR_VM, expect_next, first_vm, plugin_for, with_probe
from arm_kvm.pytest_plugin.selection import owner_of
from arm_kvm.pytest_plugin.session import HostSession
from arm_kvm.pytest_plugin.stash import BLAMED, FAILED, POOL, SESSION
from arm_kvm.recorder.breakpoints import Breakpoints
from arm_kvm.recorder.probe import Probe
from arm_kvm.recorder.recorder import Mechanism, Recorder
from arm_kvm.recorder.recording import Recording
from arm_kvm.support.errors import UNAVAILABLE, LabError, QemuKilled
from arm_kvm.support.paths import CONFIGS
from arm_kvm.vmm.process import Vmm
from arm_kvm.vmm.vgic import Vgic
from arm_kvm.vmm.vm import Vm

_RECORDERS: WeakKeyDictionary[Host, Recorder] = WeakKeyDictionary()


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The live host this case runs on: a real Linux on an emulated board.

    ``host.agent`` takes requests, ``host.ssh`` shell commands, ``host.machine`` is the board itself
    (console, RAM, gdbstub), ``host.release`` the kernel's version. With ``--isolation test`` (or the mark
    ``isolation("test")``) no other test has used it; else the tests of a module or of the run share it. The test's VMs
    are destroyed after it.
    """
    pool, name = request.config.stash[POOL], request.param
    host = _host_or_outcome(request.node, pool, name)
    expect_next(request.node)
    session = HostSession(host, TestFolder(pool.artifacts, request.node.nodeid), owner_of(request.node).alone)
    request.node.stash[SESSION] = session
    try:
        _require_features(request.node, host)
        yield host
    finally:
        _leave(request, pool, session)


def _host_or_outcome(item: pytest.Item, pool: Pool, name: str) -> Host:
    """Return the live host. Skips the test where the host's kernel cannot be fetched now. Raises HostUnusable."""
    try:
        return pool.host(name, owner_of(item), plugin_for(item))
    except HostBroken as e:
        cause = e.cause
    if isinstance(cause, UNAVAILABLE) and not item.config.getoption("--require-kvm"):
        item.stash[BLAMED] = pool.configs[name].path
        pytest.skip(f"{name}: {cause.one_line}")
    if name in pool.told:
        words = f"host {name} could not be used earlier in this run, and is not tried again: {cause.one_line}"
    else:
        words = f"host {name} cannot be used: {cause}"
    if not isinstance(cause, QemuKilled):  # that says nothing of the host: the next test starts another
        pool.told.add(name)
    raise HostUnusable(words, cause)


def _require_features(item: pytest.Item, host: Host) -> None:
    """Skip the case, naming kernel and feature, where its mark ``feature`` names what this kernel lacks."""
    for mark in item.iter_markers("feature"):
        for name in mark.args:
            if words := features.lacking(host, name):
                pytest.skip(words)


def _leave(request: pytest.FixtureRequest, pool: Pool, session: HostSession) -> None:
    """Collect the artifacts, and give the host back to the pool: clean, to be kept, or to be discarded."""
    host, node = session.host, request.node
    failed = node.stash.get(FAILED, False)
    if not pool.holds(host):  # Ctrl-C has closed the pool
        _collect(node, session)
        return
    if failed and request.config.getoption("--keep") and host.machine.alive:
        _collect(node, session)
        pool.keep(host.config.name)
        return
    why = None if session.dead or (failed and session.alone) else _destroy_vms(session)
    if not host.machine.alive:
        session.folder.write("lost.txt", str(host.machine.lost()))
    _collect(node, session)
    if isinstance(why, VmsLeft | HostLost):
        pool.discard(host.config.name)
    else:
        pool.done(host)
    if why and not failed:
        raise why


def _destroy_vms(session: HostSession) -> Failed | None:
    """Destroy the test's VMs; return the failure if that goes wrong."""
    try:
        findings = session.destroy_vms()
    except LabError as e:
        if session.host.machine.alive and session.host.agent.usable:
            return VmsLeft(f"the test's VMs could not be destroyed: {e}", pytrace=False)
        return HostLost("while the test's VMs were destroyed, its host was lost", e)
    if findings:
        return ContractBroken("the kernel complained after the test, while its VMs were destroyed", findings)
    return None


def _collect(node: pytest.Item, session: HostSession) -> None:
    session.folder.collect(session.host.machine.logs)
    node.user_properties += [("artifact", str(path)) for path in session.folder.files]


@pytest.fixture
def make_vm(host: Host, isa: str) -> Callable[..., Vm]:
    """Create VMs: ``make_vm(vcpus=1, ipa_bits=0)``. Each has the guest payload in it and no other memory.

    ``vm.add_memory(ipa, size)`` adds memory; ``vm.guest`` gives the guest orders (``vm.guests[n]`` on the other
    vCPUs); ``vm.device`` answers its MMIO accesses.
    """

    def make(**kind: Any) -> Vm:
        return host.create_vm(isa, **kind)

    return make


@pytest.fixture
def make_vms(host: Host, isa: str) -> Callable[..., list[Vm]]:
    """Create many VMs at once: ``make_vms(300)``."""

    def make(count: int, **kind: Any) -> list[Vm]:
        return host.create_vms(isa, count, **kind)

    return make


@pytest.fixture
def make_vgic(host: Host) -> Callable[[Vm], Vgic]:
    """``make_vgic(vm)``: an in-kernel GICv2 in a VM that has not run yet. The test places its frames."""
    gicv = host.gicv

    def make(vm: Vm) -> Vgic:
        return vm.create_vgic(gicv)

    return make


@pytest.fixture
def ssh(host: Host) -> Ssh:
    """The host's shell, connected: ``ssh.run("uname -a")`` returns what the command prints."""
    return host.ssh


@pytest.fixture
def make_vmm(host: Host, ssh: Ssh) -> Iterator[Callable[[], Vmm]]:
    """``make_vmm()``: another VMM process on the host, which may be killed: ``vmm.create_vm(isa)``, ``vmm.kill()``."""
    made: list[Vmm] = []

    def make() -> Vmm:
        made.append(host.start_vmm())
        return made[-1]

    yield make
    for vmm in made:
        vmm.end()


@pytest.fixture(name=OUR_VM)
def _vm(request: pytest.FixtureRequest, host: Host, isa: str) -> Vm:
    return first_vm(request.node, host)


@pytest.fixture
def vm(_lab_vm: Vm) -> Vm:
    """A VM with no memory but the payload's own, and one vCPU, or as many as the mark ``vcpus(n)`` says.

    With ``vcpus(n, pinned=True)`` each vCPU is bound to a CPU of the host. See ``make_vm``.
    """
    return _lab_vm


@pytest.fixture
def stage2(request: pytest.FixtureRequest, host: Host) -> Callable[[Vm], Stage2]:
    """``stage2(vm)``: the VM's stage-2 tables now, read from the board's RAM with the CPUs stopped.

    Safety is checked every time: a violation fails the test with its diff. The result has ``leaf(ipa)``,
    ``mapped(ipa, size)``, ``within(ipa, size)``, ``leaves`` (numpy arrays) and ``regime`` (geometry).
    """
    return _session(request).oracle.stage2


@pytest.fixture
def oracle(request: pytest.FixtureRequest, host: Host) -> Oracle:
    """The oracle itself, for tests that want its findings as a value: ``oracle.examine(vm)``."""
    return _session(request).oracle


def _session(request: pytest.FixtureRequest) -> HostSession:
    item: pytest.Item = request.node
    return item.stash[SESSION]


def _recorder(config: pytest.Config, session: HostSession) -> Recorder:
    host = session.host
    if host not in _RECORDERS:
        _RECORDERS[host] = Recorder(host, _mechanism(config, host), session.oracle.locator)
    return _RECORDERS[host]


def _mechanism(config: pytest.Config, host: Host) -> Mechanism:
    if not with_probe(config):
        return Breakpoints(host)
    probe = host.machine.plugin
    assert isinstance(probe, Probe), "prepare.plugin_for() loads it for every case that records"
    return probe


@pytest.fixture
def recorder(request: pytest.FixtureRequest, host: Host) -> Recorder:
    """The recorder itself: ``recorder.points``, the instructions it watches, ``recorder.kernel``, the symbols."""
    return _recorder(request.config, _session(request))


@pytest.fixture
def record(request: pytest.FixtureRequest, recorder: Recorder) -> Callable[..., AbstractContextManager[Recording]]:
    """``with record() as run:`` records every VTTBR write, invalidation, guest entry and table change.

    When the block ends the trace is checked, and a broken rule fails the test; ``record(judge=False)`` leaves that
    to the test. Then ``run.trace``, ``run.violations``, ``run.vmids(vm)``, ``run.rollovers`` ... tell what happened.
    The trace is kept among the test's artifacts: ``arm-kvm trace check FILE``, ``arm-kvm trace draw FILE``.
    """
    session = _session(request)

    @contextmanager
    def recording(judge: bool = True) -> Iterator[Recording]:
        run = Recording(recorder)
        try:
            with run.running():
                yield run
        finally:
            if run.trace.events:
                run.trace.save(session.folder.path(f"events-{len(session.folder.files)}.trace"))
        if judge and run.violations:
            raise ProtocolBroken(run.trace, run.violations)

    return recording


@pytest.fixture
def vmid(request: pytest.FixtureRequest, host: Host) -> Callable[[Vm], int]:
    """``vmid(vm)``: the VMID in VTTBR, sampled from a CPU's registers while the VM's guest spins."""
    return _session(request).oracle.vmid


@pytest.fixture
def trace(
    request: pytest.FixtureRequest, host: Host
) -> Callable[..., AbstractContextManager[list[trace_.FtraceEvent]]]:
    """``with trace("kvm:kvm_guest_fault") as events:`` records ftrace events; the list is full after the block."""
    folder = _session(request).folder

    @contextmanager
    def record(*names: str) -> Iterator[list[trace_.FtraceEvent]]:
        seen = trace_.Traced()
        try:
            with trace_.traced(host.agent, names) as seen:
                yield seen.events
        finally:
            folder.write(f"trace-{len(folder.files)}.txt", seen.text)

    return record


@pytest.fixture
def witness(request: pytest.FixtureRequest, host: Host) -> Witness:
    """``with witness(Operation.DONTNEED, memory, offset, size) as seen:`` judges an operation on guest memory.

    The block carries the operation out. Afterwards stage 2 of every VM is compared with what the reference model
    demands and allows, and so are the kernel's notifier trace events; a breach fails the test. Pass ``exact=False``
    while guests run: they may map pages meanwhile, so of mappings the model then demands only that none went without
    a notifier call. If the block does more than one operation, ``seen.also(Operation.X, memory, offset, size)`` within
    it names the others.
    """
    return Witness(_session(request).oracle, host)


@pytest.fixture
def keep(request: pytest.FixtureRequest, host: Host) -> Callable[[str, str], Path]:
    """``keep(name, text)`` writes a file among the test's artifacts and returns its path."""
    return _session(request).folder.write


@pytest.fixture
def replay_line(request: pytest.FixtureRequest, host: Host) -> Callable[[Path], str]:
    """``replay_line(path)``: the command that replays a kept sequence on this host, kernel and QEMU."""

    def line(path: Path) -> str:
        own = host.config.path.parent == CONFIGS / "hosts"
        words = ["arm-kvm", "replay", str(path), "--host", host.config.name if own else str(host.config.path)]
        pool, name = request.config.stash[POOL], host.config.name
        for option, chosen in (("--kernel", pool.override(name)), ("--qemu", pool.qemu(name))):
            words += [option, chosen] if chosen else []
        return shlex.join(words)

    return line


@pytest.fixture
def known_fault(host: Host) -> Callable[..., NoReturn]:
    """``known_fault("name")``: the host shows exactly this fault of ``arm_kvm/known_faults.py``.

    Call it only where the test has recognised exactly that wrong result. On the kernels that are known to have the
    fault, the case is then an expected failure; on any other it fails, with the exception being handled, if there is
    one. Any other wrong result must fail; a mended kernel passes. ``seen="..."`` is put before the fault's description.
    ``fatal=True``: the fault took down the host; the case must be marked ``may_end_host``, which gives it one of its
    own.
    """

    def known(name: str, *, seen: str = "", fatal: bool = False) -> NoReturn:
        fault = known_faults.find(name)
        text = f"{seen}: {fault.text}" if seen else fault.text
        architecture = host.config.architecture.name
        if fault.covers(host.kernel_version, architecture):
            raise (KnownDeath if fatal else pytest.xfail.Exception)(text)
        words = f"Linux {host.release} ({architecture}) shows a fault known of {fault.kernels} only: {text}"
        if shown := sys.exception():
            shown.add_note(words)
            raise shown
        raise pytest.fail.Exception(words)

    return known
