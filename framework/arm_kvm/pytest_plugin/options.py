"""Options, and the header that names each host's QEMU and kernel before the first test."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from arm_kvm.host import config as host_files
from arm_kvm.host import emulators
from arm_kvm.host.kernel import sources
from arm_kvm.hosts.pool import HostBroken, Pool
from arm_kvm.pytest_plugin.order import worker_of
from arm_kvm.pytest_plugin.selection import ISOLATIONS, host_name
from arm_kvm.pytest_plugin.stash import POOL
from arm_kvm.support.errors import ConfigError, EmulatorError, KernelError, LabError
from arm_kvm.support.paths import is_there

_DEFAULT_HOSTS = ("a15", "arm64", "a15-debian")


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
        "--qemu",
        action="append",
        default=[],
        metavar="[HOST=]QEMU",
        help="QEMU for the hosts: a program or the folder it was built in, or deb:SUITE, the package of another Debian "
        "suite (default: the installed one; repeatable with HOST=)",
    )
    group.addoption(
        "--require-kvm", action="store_true", help="fail, not skip, where a host's kernel cannot be fetched now"
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
        help="how VTTBR and TLB events are recorded: a TCG plugin (default), or breakpoints of the gdbstub, slower",
    )
    group.addoption(
        "--isolation",
        choices=ISOLATIONS,
        default="session",
        help="restore a pristine host for the run (default), for every module, or for every test",
    )
    group.addoption("--entropy", action="store_true", help="stir fresh entropy into every restored host")
    group.addoption("--keep", action="store_true", help="leave the machine of a failed test running until Ctrl-C")


def _by_host(option: str, values: list[str], hosts: list[str]) -> dict[str, str]:
    """Sort the values of ``--kernel`` or ``--qemu`` by host, "" for the value without a host. Raises ConfigError."""
    chosen: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        known = equals and (name in hosts or name in host_files.host_names())
        if equals and not known and re.fullmatch(r"[\w-]+", name) and not Path(value).exists():
            raise ConfigError(f"{option} {value}: no host is called {name!r}; hosts of this run: {', '.join(hosts)}")
        name, what = (name, rest) if known else ("", value)
        if known and name not in hosts:
            raise ConfigError(f"{option} {value}: host {name} does not run; hosts of this run: {', '.join(hosts)}")
        if name in chosen:
            raise ConfigError(f"{option} {value}: {name or 'every host'} has one already: {chosen[name]}")
        chosen[name] = what
    return chosen


def _hosts(names: list[str]) -> list[host_files.HostConfig]:
    """Load the hosts of these names. Raises ConfigError."""
    hosts = [host_files.find(name) for name in dict.fromkeys(names)]
    for host in hosts:
        if same := [other.path for other in hosts if other.name == host.name and other.path != host.path]:
            raise ConfigError(f"two hosts are called {host.name!r}: {host.path} and {same[0]}; rename one of the files")
    return hosts


def _artifacts(folder: str) -> Path:
    """Check that the folder is writable, or can be created. Raises UsageError."""
    path = Path(folder).absolute()
    there = next(parent for parent in (path, *path.parents) if is_there(parent))
    if not folder or not there.is_dir() or not os.access(there, os.W_OK):
        raise pytest.UsageError(f"--artifacts {folder!r}: no folder that can be written")
    return path


def pytest_configure(config: pytest.Config) -> None:
    if (count := config.getoption("--count")) is not None and count < 1:
        raise pytest.UsageError(f"--count {count}: play at least one sequence")
    names = config.getoption("--host") or list(_DEFAULT_HOSTS)
    try:
        hosts = _hosts(names)
        known = [host.name for host in hosts]
        kernels, qemus = (_by_host(option, config.getoption(option), known) for option in ("--kernel", "--qemu"))
        for host in hosts:
            emulators.check(host, qemus.get(host.name, qemus.get("")))
            if (kernel := kernels.get(host.name, kernels.get(""))) is not None:
                sources.check(host, kernel)
    except LabError as e:
        raise pytest.UsageError(str(e)) from e
    artifacts = _artifacts(config.getoption("--artifacts"))
    config.stash[POOL] = Pool(hosts, kernels, qemus, artifacts, worker_of(config), config.getoption("--entropy"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch and build the kernels before the first test, with progress on the terminal, and print the header."""
    if not session.config.option.collectonly:
        _prepare(session.config, {name for item in session.items if (name := host_name(item)) is not None})


def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """Do the same before the workers start; this process does not collect, so for all hosts."""
    if config.getoption("--keep"):
        raise pytest.UsageError("--keep leaves a machine running for the user at the terminal: use it with -n 0")
    _prepare(config, set(config.stash[POOL].configs))


def _prepare(config: pytest.Config, needed: set[str]) -> None:
    pool = config.stash[POOL]
    capture = config.pluginmanager.getplugin("capturemanager")
    terminal = config.pluginmanager.getplugin("terminalreporter")
    for name in filter(needed.__contains__, pool.configs):
        with capture.global_and_fixture_disabled():
            line = _describe(pool, name)
        if terminal is not None:
            terminal.write_line(line)


def _describe(pool: Pool, name: str) -> str:
    """Return the host's line of the header. Raises UsageError where the kernel or QEMU asked for does not exist."""
    config = pool.configs[name]
    try:
        qemu = pool.fitted(name).board.qemu.name
        kernel = pool.kernel(name).name
    except HostBroken as e:
        if type(e.cause) in (KernelError, ConfigError, EmulatorError):
            raise pytest.UsageError(f"host {name} cannot be used: {e.cause}") from e
        return f"{name}: no kernel: {e.cause.message.splitlines()[0]}"
    guests = "/".join(config.guests) or "none"
    return f"{name}: {qemu}, {config.board.cpu} x{config.board.cpus}; {kernel}; guests {guests}"
