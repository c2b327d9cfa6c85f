"""The hosts of one run: started when first asked for, replaced when lost, never retried when they do not boot.

Unless somebody killed their QEMU: that fails the test that asked for the host, and the next test has another.
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

from arm_kvm.host import emulators, snapshots
from arm_kvm.host.config import HostConfig
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import Kernel, obtain
from arm_kvm.host.snapshots import Snapshot
from arm_kvm.hosts.spares import SPARES, Spares
from arm_kvm.machine.machine import Plugin
from arm_kvm.support.errors import AgentError, LabError, MachineError, NoProbe, QemuKilled
from arm_kvm.support.limits import told
from arm_kvm.support.progress import note

MakePlugin = Callable[[HostConfig], Plugin]
_ENTROPY = 64  #: bytes
_TRUST = 2  #: restores of one kind of host in a row that may fail; then it boots


class HostBroken(Exception):
    """This host cannot be used in this run. ``cause`` is the first error met."""

    def __init__(self, cause: LabError) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass(frozen=True)
class Owner:
    """Who uses a host: all tests of the run, or those of the same name (a module, a mutant), or one ``alone``."""

    name: str = ""
    alone: bool = False


EVERYBODY = Owner()


@dataclass
class _Live:
    host: Host
    owner: Owner


@dataclass(frozen=True)
class Expected:
    """What a test will ask for that has a host to itself, and what is done to the host before."""

    owner: Owner
    name: str
    make_plugin: MakePlugin | None
    furnish: Callable[[Host], None]


class Pool:
    """Live hosts by name. ``kernels`` and ``qemus`` map a host's name (or "") to the ``--kernel`` and ``--qemu`` given.

    ``worker`` is part of the names of folders for logs; with ``entropy`` restored hosts have
    random numbers of their own.
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
        self.told: set[str] = set()  #: hosts whose trouble a test has already shown in full
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
        """A pool of this host alone, for what its tests share with nobody: ``prepare``, done to it before the first,
        and a kernel, if one is given. What is left of them is in a folder of its own (:meth:`folder_apart`).
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
        return self.artifacts / "mutants" / f"{name}-{why}"

    def override(self, name: str) -> str | None:
        """The ``--kernel`` that was given for this host."""
        return self._overrides.get(name, self._overrides.get(""))

    def qemu(self, name: str) -> str | None:
        """The ``--qemu`` that was given for this host."""
        return self._qemus.get(name, self._qemus.get(""))

    def fitted(self, name: str) -> HostConfig:
        """The host on its QEMU, which is fetched on first use. Raises HostBroken."""
        if name not in self._fitted:
            self._fitted[name] = self._once(name, lambda: emulators.fitted(self.configs[name], self.qemu(name)))
        return self._fitted[name]

    def kernel(self, name: str) -> Kernel:
        """The host's kernel, fetched or built on first use. Raises HostBroken."""
        if name not in self._kernels:
            self._kernels[name] = self._once(name, lambda: obtain(self.configs[name], self.override(name)))
        return self._kernels[name]

    def host(self, name: str, owner: Owner = EVERYBODY, make_plugin: MakePlugin | None = None) -> Host:
        """The live host of this name that is this owner's. Raises HostBroken, and what preparing it raises.

        With a plugin made for its QEMU, if one is asked for: a host that runs without is replaced by one with it, and
        one with it serves those that want none, too.
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
        """The host, with KVM in it if it should have it, and prepared; or none at all."""
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
        """Tests to come have hosts of their own: restore and furnish them meanwhile, on CPUs that this one leaves idle.

        Where that fails, the test has a host restored when it asks for one, and meets the reason.
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
        """A folder for each machine; those of single tests share some, for a test's folder has its part of the logs."""
        number = next(self._starts)
        parts = [self._worker, f"{number:02}", name]
        if owner.alone:
            parts = [self._worker, name, f"alone{number % (SPARES + 2)}"]
        return self.artifacts / "hosts" / "-".join(filter(None, parts))

    def _once(self, name: str, action):
        """Do it, unless something failed for this host before; keep the first error that is the host's own.

        A QEMU that somebody killed is not, nor a probe that cannot be had: without one, the host is as good as ever.
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
            self._broken[name] = told(e, self.artifacts)
            raise HostBroken(self._broken[name]) from e

    def holds(self, host: Host) -> bool:
        """Whether the host is in use; not so once the pool is closed, or has ended or kept it."""
        return any(live.host is host for live in self._live.values())

    def done(self, host: Host) -> None:
        """A test is done with this host. It ends if nobody shares it."""
        if self._live[host.config.name].owner.alone:
            del self._live[host.config.name]
            self._spares.end(host)

    def discard(self, name: str) -> None:
        """End this host's machine; the next test that needs the host gets a fresh one."""
        if (live := self._live.pop(name, None)) is not None:
            live.host.shutdown()

    def keep(self, name: str) -> Host | None:
        """Take the host out of the run and leave its machine as it is, with the gdbstub free."""
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
        with ExitStack() as stack:  # every one is ended, whatever another says
            for host in hosts:
                stack.callback(host.shutdown)
