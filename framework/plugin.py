"""The pytest front door: options, fixtures in the field's terms, and the judgement after every test.

``pytest --fixtures`` prints the docstrings below; they are the manual for authors of test cases.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest

from . import config as host_files
from .artifacts import TestFolder
from .errors import ConfigError, KernelError, LabError
from .events.violations import ProtocolBroken
from .host.host import Host
from .host.vgic import Vgic, gicv_of
from .host.vm import Vm
from .host.vmm import Vmm
from .machine import version
from .oracle import Oracle
from .oracle import trace as trace_
from .oracle.stage2 import Stage2
from .oracle.verdicts import Finding
from .oracle.witness import Witness
from .pool import Broken, Pool
from .recorder.breakpoints import Breakpoints
from .recorder.probe import Probe
from .recorder.recorder import Recorder
from .recorder.recording import Recording

_POOL = pytest.StashKey[Pool]()
_SESSION = pytest.StashKey["_HostSession"]()
_BLAMED = pytest.StashKey[Path]()  # the host file a skip is due to
_TOLD = pytest.StashKey[set[str]]()  # hosts whose trouble a test has already shown in full
_ORACLES: WeakKeyDictionary[Host, Oracle] = WeakKeyDictionary()
_RECORDERS: WeakKeyDictionary[Host, Recorder] = WeakKeyDictionary()
_DUMPED = 16  #: VMs of one test whose tables are written down; of more, only those with findings
_DEFAULT_HOSTS = ("a15", "arm64", "a15-debian")


# -- options and header --------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("arm-kvm", "hosts and kernels to judge")
    group.addoption(
        "--host", action="append", metavar="NAME", help="a host of configs/hosts, or a host file (repeatable)"
    )
    group.addoption(
        "--kernel",
        action="append",
        default=[],
        metavar="[HOST=]KERNEL",
        help="kernel for the hosts: an image, a source tree, or deb:PACKAGE@SUITE (repeatable with HOST=)",
    )
    group.addoption(
        "--require-kvm", action="store_true", help="fail, not skip, where a host's kernel or its KVM cannot be had"
    )
    group.addoption(
        "--artifacts", default="artifacts", metavar="DIR", help="folder for logs and dumps (default: artifacts)"
    )
    group.addoption(
        "--sequences",
        choices=("quick", "nightly"),
        default="quick",
        help="random sequences: the same few in every run (default), or many, seeded by the date",
    )
    group.addoption("--count", type=int, metavar="N", help="play N random sequences, not the profile's number")
    group.addoption("--slow", action="store_true", help="run the cases marked slow, too: minutes each")
    group.addoption(
        "--recorder",
        choices=("probe", "breakpoints"),
        default="probe",
        help="how VTTBR and TLB events are recorded: a TCG plugin (QEMU up to 8), or the gdbstub (any QEMU, slow)",
    )
    group.addoption("--keep", action="store_true", help="leave the machine of a failed test running until Ctrl-C")


def _kernels(values: list[str], hosts: list[str]) -> dict[str, str]:
    """``--kernel`` values by host; "" for the one that names no host. Raises ConfigError."""
    kernels: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        known = equals and (name in hosts or name in host_files.host_names())
        name, what = (name, rest) if known else ("", value)
        if known and name not in hosts:
            raise ConfigError(f"--kernel {value}: host {name} does not run; hosts of this run: {', '.join(hosts)}")
        if name in kernels:
            raise ConfigError(f"--kernel {value}: {name or 'every host'} has a kernel already: {kernels[name]}")
        kernels[name] = what
    return kernels


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--host") or list(_DEFAULT_HOSTS)
    try:
        hosts = [host_files.find(name) for name in dict.fromkeys(names)]
        kernels = _kernels(config.getoption("--kernel"), [host.name for host in hosts])
    except LabError as e:
        raise pytest.UsageError(str(e)) from e
    artifacts = Path(config.getoption("--artifacts")).absolute()
    config.stash[_POOL] = Pool(hosts, kernels, artifacts)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch and build kernels before the first test, with their progress on the terminal, and name them."""
    if session.config.option.collectonly:
        return
    pool = session.config.stash[_POOL]
    needed = {item.callspec.params["host"] for item in session.items if _needs_host(item)}
    capture = session.config.pluginmanager.getplugin("capturemanager")
    terminal = session.config.pluginmanager.getplugin("terminalreporter")
    for name in filter(needed.__contains__, pool.configs):
        with capture.global_and_fixture_disabled():
            line = _describe(pool, name)
        if terminal is not None:
            terminal.write_line(line)


def _describe(pool: Pool, name: str) -> str:
    config = pool.configs[name]
    try:
        kernel = pool.kernel(name).name
    except Broken as e:
        kernel = f"no kernel: {e.cause.message.splitlines()[0]}"
    guests = "/".join(config.guests) or "none"
    return (
        f"{name}: {version.of(config.board.qemu)}, {config.board.cpu} x{config.board.cpus}; {kernel}; guests {guests}"
    )


# -- which case runs where --------------------------------------------------------------------------------


def _needs_host(item: pytest.Item) -> bool:
    return "host" in getattr(getattr(item, "callspec", None), "params", {})


def _suits(config: host_files.HostConfig, definition: pytest.Item) -> bool:
    wanted = {name for mark in definition.iter_markers("needs") for name in mark.args}
    if definition.get_closest_marker("no_kvm"):
        return not config.has_kvm and wanted <= config.can
    return config.has_kvm and wanted <= config.can


def _guests(config: host_files.HostConfig, definition: pytest.Item) -> list[str]:
    """The guest instruction sets a case runs with on this host."""
    only = definition.get_closest_marker("guests")
    isas = config.guests[:1] if definition.get_closest_marker("native") else config.guests
    return [isa for isa in isas if not only or isa in only.args]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "host" not in metafunc.fixturenames:
        return
    suited = [c for c in metafunc.config.stash[_POOL].configs.values() if _suits(c, metafunc.definition)]
    if "isa" not in metafunc.fixturenames:
        metafunc.parametrize("host", [c.name for c in suited], indirect=True)
        return
    pairs = [(c.name, isa) for c in suited for isa in _guests(c, metafunc.definition)]
    metafunc.parametrize(("host", "isa"), pairs, indirect=["host"], ids=[f"{h}-{i}" for h, i in pairs])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Drop cases that no chosen host suits; run the rest host by host, so that each boots once.

    Those that record come last on their host, which boots once more with the probe: the others do not pay for it.
    """
    order = list(config.stash[_POOL].configs)
    if not config.getoption("--slow"):
        slow = [i for i in items if i.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [i for i in items if i not in slow]
    nowhere = [i for i in items if "host" in getattr(i, "fixturenames", ()) and not isinstance(_host_name(i), str)]
    if nowhere:
        config.hook.pytest_deselected(items=nowhere)
    items[:] = [i for i in items if i not in nowhere]
    items.sort(key=lambda i: (order.index(_host_name(i)) if _needs_host(i) else -1, _records(i)))


def _records(item: pytest.Item) -> bool:
    return "recorder" in getattr(item, "fixturenames", ())


def _host_name(item: pytest.Item) -> object:
    return getattr(getattr(item, "callspec", None), "params", {}).get("host")


# -- one test on one host ----------------------------------------------------------------------------------


class _HostSession:
    """What the lab holds of one test: its host, its oracle, its folder; and the judgement at its end."""

    def __init__(self, host: Host, folder: TestFolder) -> None:
        self.host = host
        self.oracle = _ORACLES.setdefault(host, Oracle(host))  # it remembers what it has found of the host
        self.folder = folder
        folder.begin(host.machine.logs)
        self.oracle.splats()  # what was said between tests is nobody's

    def judge(self) -> list[Finding]:
        """Every VM of the test that has run, and the kernel's log."""
        findings = []
        vms = [vm for vm in self.host.vms if vm.alive and vm.entered]
        for vm, (stage2, found) in zip(vms, self.oracle.examine(*vms) if vms else [], strict=True):
            if found or len(vms) <= _DUMPED:
                self.folder.write(f"stage2-{vm.id}.txt", stage2.dump())
            findings += found
        return findings + self.oracle.splats()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Judge the host after the test's own assertions: a test passes only on a kernel that kept its contract."""
    session = item.stash.get(_SESSION, None)
    try:
        result = yield
    except (Exception, pytest.fail.Exception) as e:
        if session is not None and not isinstance(e, pytest.skip.Exception):
            _judge_failed(item, session, known=isinstance(e, pytest.xfail.Exception))
        raise
    if session is not None:
        _judge_passed(session)
    return result


def _judge_passed(session: _HostSession) -> None:
    lost, findings = None, []
    try:
        session.host.machine.check()
        session.host.agent.require()
        findings = session.judge()
    except LabError as e:
        lost = e
    if lost is not None:
        pytest.fail(f"after the test, its host is lost: {lost}", pytrace=False)
    if findings:
        pytest.fail(_contract(findings), pytrace=False)


def _judge_failed(item: pytest.Item, session: _HostSession, known: bool) -> None:
    """Of a failed test the findings are a section of its report; beside a known fault they are a failure."""
    if known:
        _judge_passed(session)
        return
    with suppress(Exception):  # whatever the test left behind, its own failure is the one to show
        if findings := session.judge():
            item.add_report_section("call", "arm-kvm", _contract(findings))


def _contract(findings: list[Finding]) -> str:
    text = "\n".join(map(str, findings))
    return f"after the test, the kernel's state breaks the contract:\n{text}"


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    if report.failed:
        item.stash[_FAILED] = True
    if report.skipped and (host_file := item.stash.get(_BLAMED, None)):
        # One place for all of a host's skips, so that the summary has one line for them.
        report.longrepr = (os.path.relpath(host_file), 1, report.longrepr[2])
    return report


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The live host this case runs on: a real Linux on an emulated board.

    ``host.agent`` takes requests, ``host.ssh`` shell commands, ``host.machine`` is the board itself
    (console, RAM, gdbstub), ``host.release`` the kernel's version. Shared by the tests of a run; VMs
    are destroyed after each.
    """
    pool, name = request.config.stash[_POOL], request.param
    host = _host_or_outcome(request.node, pool, name)
    session = _HostSession(host, TestFolder(pool.artifacts, request.node.nodeid))
    request.node.stash[_SESSION] = session
    try:
        yield host
    finally:
        _leave(request, pool, session)


def _host_or_outcome(item: pytest.Item, pool: Pool, name: str) -> Host:
    """The live host; or a skip where a kernel with KVM cannot be had, a failure where anything else is wrong."""
    try:
        return pool.host(name, Probe if _records(item) and _with_probe(item.config) else None)
    except Broken as e:
        cause = e.cause
    config = item.config
    if isinstance(cause, KernelError) and not config.getoption("--require-kvm"):
        item.stash[_BLAMED] = pool.configs[name].path
        pytest.skip(f"{name}: {cause.one_line}")
    told = config.stash.setdefault(_TOLD, set())
    if name in told:
        pytest.fail(
            f"host {name} could not be used earlier in this run, and is not tried again: {cause.one_line}",
            pytrace=False,
        )
    told.add(name)
    pytest.fail(f"host {name} cannot be used: {cause}", pytrace=False)


def _leave(request: pytest.FixtureRequest, pool: Pool, session: _HostSession) -> None:
    """Collect the artifacts, and give the host back clean, kept or not at all."""
    host, node = session.host, request.node
    alive = host.machine.alive
    if not alive:
        session.folder.write("lost.txt", str(host.machine.lost()))
    session.folder.collect(host.machine.logs)
    node.user_properties += [("artifact", str(path)) for path in session.folder.files]
    if node.stash.get(_FAILED, False) and request.config.getoption("--keep") and alive:
        pool.keep(host.config.name)
        return
    try:
        host.reset()
    except LabError:
        pool.discard(host.config.name)


@pytest.fixture
def make_vm(host: Host, isa: str) -> Callable[..., Vm]:
    """Create VMs: ``make_vm(vcpus=1, ipa_bits=0)``. Each has the payload in it and nothing else.

    A VM's memory is added with ``vm.add_memory(ipa, size)``; its guest is commanded through ``vm.guest``
    (and ``vm.guests[n]`` on the other vCPUs); what it asks of devices is answered by ``vm.device``.
    """

    def make(**kind) -> Vm:
        return host.create_vm(isa, **kind)

    return make


@pytest.fixture
def make_vms(host: Host, isa: str) -> Callable[..., list[Vm]]:
    """Create many VMs at once: ``make_vms(300)``."""

    def make(count: int, **kind) -> list[Vm]:
        return host.create_vms(isa, count, **kind)

    return make


@pytest.fixture
def make_vgic(host: Host) -> Callable[[Vm], Vgic]:
    """``make_vgic(vm)``: an in-kernel GICv2 in a VM that has not run yet. Its frames are still to be placed."""
    gicv = gicv_of(host)

    def make(vm: Vm) -> Vgic:
        return Vgic(vm, gicv)

    return make


@pytest.fixture
def make_vmm(host: Host) -> Iterator[Callable[[], Vmm]]:
    """``make_vmm()``: another VMM process on the host, to be killed: ``vmm.create_vm(isa)``, ``vmm.kill()``."""
    made: list[Vmm] = []

    def make() -> Vmm:
        made.append(Vmm(host))
        return made[-1]

    yield make
    for vmm in made:
        vmm.end()


@pytest.fixture
def vm(make_vm: Callable[..., Vm]) -> Vm:
    """A VM with one vCPU, and no memory but the payload's own. See ``make_vm``."""
    return make_vm()


@pytest.fixture
def stage2(request: pytest.FixtureRequest, host: Host) -> Callable[[Vm], Stage2]:
    """``stage2(vm)``: the VM's stage-2 tables now, read from the board's RAM with the CPUs stopped.

    Safety is checked every time: a violation fails the test with its diff. The result has ``leaf(ipa)``,
    ``mapped(ipa, size)``, ``within(ipa, size)``, ``leaves`` (numpy arrays) and ``regime`` (geometry).
    """
    return request.node.stash[_SESSION].oracle.stage2


@pytest.fixture
def oracle(request: pytest.FixtureRequest, host: Host) -> Oracle:
    """The judge itself, for tests that want its findings and not its failure: ``oracle.examine(vm)``."""
    return request.node.stash[_SESSION].oracle


def _with_probe(config: pytest.Config) -> bool:
    return config.getoption("--recorder") == "probe"


def _recorder(config: pytest.Config, session: _HostSession) -> Recorder:
    host = session.host
    if host not in _RECORDERS:
        mechanism = host.machine.plugin if _with_probe(config) else Breakpoints(host)
        _RECORDERS[host] = Recorder(host, mechanism, session.oracle.sight)
    return _RECORDERS[host]


@pytest.fixture
def recorder(request: pytest.FixtureRequest, host: Host) -> Recorder:
    """The recorder itself: ``recorder.points``, the instructions it watches, ``recorder.kernel``, the symbols."""
    return _recorder(request.config, request.node.stash[_SESSION])


@pytest.fixture
def record(request: pytest.FixtureRequest, recorder: Recorder) -> Callable[..., AbstractContextManager[Recording]]:
    """``with record() as run:`` records every VTTBR write, invalidation, guest entry and table change.

    When the block ends the trace is checked, and a broken rule fails the test; ``record(judge=False)`` leaves that
    to the test. Then ``run.trace``, ``run.violations``, ``run.vmids(vm)``, ``run.rollovers`` ... say what happened.
    The trace is kept among the test's artifacts: ``arm-kvm trace check FILE``, ``arm-kvm trace draw FILE``.
    """
    session = request.node.stash[_SESSION]

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
    return request.node.stash[_SESSION].oracle.vmid


@pytest.fixture
def trace(request: pytest.FixtureRequest, host: Host):
    """``with trace("kvm:kvm_guest_fault") as events:`` records ftrace events; the list is full after the block."""
    folder = request.node.stash[_SESSION].folder

    @contextmanager
    def record(*names: str) -> Iterator[list[trace_.Event]]:
        seen = trace_.Traced()
        try:
            with trace_.traced(host.agent, names) as seen:
                yield seen.events
        finally:
            folder.write(f"trace-{len(folder.files)}.txt", seen.text)

    return record


@pytest.fixture
def witness(request: pytest.FixtureRequest, host: Host) -> Witness:
    """``with witness(Operation.DONTNEED, memory, offset, size) as seen:`` the block does that to guest memory.

    Afterwards stage 2 of every VM is held against what the reference model demands and allows of that operation, and
    so are the kernel's notifier trace events; a breach fails the test. ``exact=False`` while guests run.
    """
    return Witness(request.node.stash[_SESSION].oracle, host)


@pytest.fixture
def keep(request: pytest.FixtureRequest, host: Host) -> Callable[[str, str], Path]:
    """``keep(name, text)``: a file among the test's artifacts; its path."""
    return request.node.stash[_SESSION].folder.write


@pytest.fixture
def known_fault() -> Callable[[str], None]:
    """``known_fault(text)``: the kernel shows exactly this fault, which its developers know; cite them.

    Call it only where the very wrong result was recognised: the case is then reported as an expected
    failure with ``text``. Any other wrong result must fail, and a mended kernel passes.
    """
    return pytest.xfail


# -- end of the run -----------------------------------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    pool = session.config.stash.get(_POOL, None)
    if pool is None:
        return
    try:
        if pool.kept:
            _wait_with(pool, session.config)
    finally:
        pool.close()


def _wait_with(pool: Pool, config: pytest.Config) -> None:
    """Stay with the kept machines until Ctrl-C: they live exactly as long as this process."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for host in pool.kept:
            print(f"\narm-kvm: {host.config.name} is kept as the failed test left it:")
            print(f"  shell:   {host.ssh_command}\n  tables:  arm-kvm stage2 {host.config.name}")
        print("Ctrl-C ends it.", flush=True)
        try:
            while any(host.machine.process.poll() is None for host in pool.kept):
                time.sleep(0.2)
        except KeyboardInterrupt:
            pass
