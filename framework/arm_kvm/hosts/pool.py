"""The hosts of one run: started when first needed, replaced when lost, and not retried when they fail to boot.

A QEMU that was killed is the exception: only the test that needed the host fails, and the next gets a new one.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TypeVar

from arm_kvm.host import emulators, snapshots
from arm_kvm.host.config import HostConfig
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import Kernel, obtain
from arm_kvm.host.snapshots import Snapshot
from arm_kvm.hosts.spares import SPARES, Spares
from arm_kvm.machine.machine import Plugin
from arm_kvm.support.errors import AgentError, LabError, MachineError, NoProbe, QemuKilled
from arm_kvm.support.limits import lab_error
from arm_kvm.support.progress import note

T = TypeVar("T")
MakePlugin = Callable[[HostConfig], Plugin]
_ENTROPY = 64  #: bytes
_TRUST = 2  #: consecutive failures to restore a kind of host, after which it is booted every time


class HostBroken(Exception):
    """This host cannot be used in this run. ``cause`` is the first error."""

    def __init__(self, cause: LabError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Owner:
    """Which tests share a host: all of the run, those of one ``name`` (a module, a mutant), or one test ``alone``."""

    name: str = ""
    alone: bool = False


EVERYBODY = Owner()


@dataclass
class _Live:
    host: Host
    owner: Owner


@dataclass(frozen=True)
class Expected:
    """The host that a later test will need for itself; ``furnish`` prepares it."""

    owner: Owner
    name: str
    make_plugin: MakePlugin | None
    furnish: Callable[[Host], None]


class Pool:
    """Live hosts by name.

    ``kernels`` and ``qemus`` map a host's name, or "" for all others, to the values of ``--kernel`` and ``--qemu``.
    ``worker`` is part of the names of log folders. With ``entropy`` each restored host gets random numbers of its own.
    """

    def __init__(
        self,
        hosts: list[HostConfig],
        kernels: dict[str, str],
        qemus: dict[str, str],
        artifacts: Path,
        worker: str,
        entropy: bool,
    ) -> None:
        self.configs = {config.name: config for config in hosts}
        self.kept: list[Host] = []
        self.told: set[str] = set()  #: hosts whose failure a test has already reported in full
        self._overrides, self._qemus = kernels, qemus
        self.artifacts = artifacts
        self._worker = worker
        self._entropy = entropy
        self._fitted: dict[str, HostConfig] = {}
        self._kernels: dict[str, Kernel] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._live: dict[str, _Live] = {}
        self._broken: dict[str, LabError] = {}
        self._distrust: Counter[str] = Counter()  #: restores in a row that failed, by host
        self._starts = count(1)
        self._spares = Spares()
        self._prepare: Callable[[Host], None] = lambda host: None

    def apart(self, name: str, why: str, prepare: Callable[[Host], None], kernel: Kernel | None = None) -> Pool:
        """A separate pool of this one host, prepared by ``prepare`` whenever it is started.

        With ``kernel`` the host runs that kernel. Logs go to :meth:`folder_apart`.
        """
        folder = self.folder_apart(name, why)
        other = Pool([self.configs[name]], self._overrides, self._qemus, folder, self._worker, self._entropy)
        other._prepare, other._fitted = prepare, self._fitted
        if kernel is None:
            other._kernels, other._snapshots, other._distrust = self._kernels, self._snapshots, self._distrust
        else:
            other._kernels = {name: kernel}
        return other

    def folder_apart(self, name: str, why: str) -> Path:
        """The artifacts' folder of :meth:`apart`."""
        return self.artifacts / "mutants" / f"{name}-{why}"

    def override(self, name: str) -> str | None:
        """The value of ``--kernel`` for this host, if any."""
        return self._overrides.get(name, self._overrides.get(""))

    def qemu(self, name: str) -> str | None:
        """The value of ``--qemu`` for this host, if any."""
        return self._qemus.get(name, self._qemus.get(""))

    def fitted(self, name: str) -> HostConfig:
        """The host with its QEMU, which is fetched on first use. Raises HostBroken."""
        if name not in self._fitted:
            self._fitted[name] = self._once(name, lambda: emulators.fitted(self.configs[name], self.qemu(name)))
        return self._fitted[name]

    def kernel(self, name: str) -> Kernel:
        """The host's kernel, fetched or built on first use. Raises HostBroken."""
        if name not in self._kernels:
            self._kernels[name] = self._once(name, lambda: obtain(self.configs[name], self.override(name)))
        return self._kernels[name]

    def host(self, name: str, owner: Owner = EVERYBODY, make_plugin: MakePlugin | None = None) -> Host:
        """The live host of this name for this owner, started if need be. Raises HostBroken, and what preparing raises.

        ``make_plugin`` makes the plugin for its QEMU. A host without a plugin is replaced if one is needed; a host with
        a plugin also serves tests that need none.
        """
        if name in self._broken:
            raise HostBroken(self._broken[name])
        if name in self._live and not self._fits(self._live[name], owner, make_plugin is not None):
            self.discard(name)
        if name not in self._live:
            host = self._once(name, lambda: self._start(name, owner, make_plugin))
            self._live[name] = _Live(self._usable(host), owner)
        return self._live[name].host

    def _usable(self, host: Host) -> Host:
        """Check that the host has the KVM that its host file promises, and prepare it; end it if that fails."""
        try:
            if host.config.has_kvm:
                self._once(host.config.name, host.require_kvm)
            self._prepare(host)
        except BaseException:
            host.shutdown()
            raise
        return host

    @staticmethod
    def _fits(live: _Live, owner: Owner, plugin: bool) -> bool:
        host = live.host
        has_plugin = host.machine.plugin is not None
        return live.owner == owner and (has_plugin or not plugin) and host.machine.alive and host.agent.usable

    def _start(self, name: str, owner: Owner, make_plugin: MakePlugin | None) -> Host:
        config, kernel = self.fitted(name), self.kernel(name)

        def plugin() -> Plugin | None:
            return make_plugin(config) if make_plugin else None

        if not config.boot_afresh and self._distrust[name] < _TRUST:
            try:
                host = self._spares.take(owner.name) or self._restore(name, self._logs(name, owner), plugin())
                self._distrust.pop(name, None)
                return host
            except QemuKilled:
                raise
            except (MachineError, AgentError) as e:
                self._distrust[name] += 1
                if snapshot := self._snapshots.pop(name, None):
                    snapshots.forget(snapshot)
                note(f"{name} cannot be restored, and boots afresh: {e.one_line}")
        return Host.boot(config, kernel, self._logs(name, owner), plugin=plugin())

    def _restore(self, name: str, logs: Path, plugin: Plugin | None) -> Host:
        entropy = os.urandom(_ENTROPY) if self._entropy else b""
        return self._snapshot(name).restore(logs, plugin, entropy)

    def expect(self, coming: Iterable[Expected]) -> None:
        """Restore and furnish hosts for coming tests in the background.

        If that fails, the host is restored when its test asks for it, and the test fails with the reason.
        """
        possible = (test for test in coming if test.name in self._snapshots and test.name not in self._broken)
        self._spares.expect({test.owner.name: partial(self._furnished, test) for test in possible})

    def _furnished(self, test: Expected) -> Host:
        plugin = test.make_plugin(self.fitted(test.name)) if test.make_plugin else None
        host = self._restore(test.name, self._logs(test.name, test.owner), plugin)
        try:
            test.furnish(host)
        except BaseException:
            host.shutdown()
            raise
        return host

    def _snapshot(self, name: str) -> Snapshot:
        if name not in self._snapshots:
            logs = self.artifacts / "hosts" / "-".join(filter(None, (self._worker, name, "snapshot")))
            self._snapshots[name] = snapshots.obtain(self.fitted(name), self.kernel(name), logs)
        return self._snapshots[name]

    def _logs(self, name: str, owner: Owner) -> Path:
        """A log folder for each machine. Hosts of single tests reuse a few, for each test keeps a copy of its logs."""
        number = next(self._starts)
        parts = [self._worker, f"{number:02}", name]
        if owner.alone:
            parts = [self._worker, name, f"alone{number % (SPARES + 2)}"]
        return self.artifacts / "hosts" / "-".join(filter(None, parts))

    def _once(self, name: str, action: Callable[[], T]) -> T:
        """Run ``action``, unless the host is broken; if it fails, the host is broken from then on. Raises HostBroken.

        A killed QEMU does not break the host, nor does a missing probe, without which the host still works.
        """
        if name in self._broken:
            raise HostBroken(self._broken[name])
        try:
            return action()
        except (QemuKilled, NoProbe) as e:
            raise HostBroken(e) from e
        except LabError as e:
            self._broken[name] = e
            raise HostBroken(e) from e
        except (OSError, MemoryError) as e:
            self._broken[name] = lab_error(e, self.artifacts)
            raise HostBroken(self._broken[name]) from e

    def holds(self, host: Host) -> bool:
        """Whether the host is in use: not once the pool has ended it, kept it, or been closed."""
        return any(live.host is host for live in self._live.values())

    def done(self, host: Host) -> None:
        """Called when a test is done with this host: end it if the test had it alone."""
        if self._live[host.config.name].owner.alone:
            del self._live[host.config.name]
            self._spares.end(host)

    def discard(self, name: str) -> None:
        """End this host's machine; the next test that needs the host gets a fresh one."""
        if (live := self._live.pop(name, None)) is not None:
            live.host.shutdown()

    def keep(self, name: str) -> Host | None:
        """Take the host out of the run but leave its machine running, with the gdbstub free."""
        if (live := self._live.pop(name, None)) is None:
            return None
        live.host.machine.release_gdb()
        self.kept.append(live.host)
        return live.host

    def close(self) -> None:
        """End all machines."""
        self._spares.close()
        hosts = [*(live.host for live in self._live.values()), *self.kept]
        self._live.clear()
        self.kept.clear()
        with ExitStack() as stack:  # ends all, even if one raises
            for host in hosts:
                stack.callback(host.shutdown)
