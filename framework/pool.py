"""The hosts of one run: booted when first asked for, replaced when lost, never retried when they do not boot."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from .config import HostConfig
from .errors import LabError
from .host.host import Host
from .host.kernel import Kernel, obtain
from .machine.machine import Plugin


class Broken(Exception):
    """This host cannot be used in this run. ``cause`` is the first error met."""

    def __init__(self, cause: LabError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Pool:
    """Live hosts by name. ``kernels`` maps a host's name (or "") to the ``--kernel`` given for it."""

    def __init__(self, hosts: list[HostConfig], kernels: dict[str, str], artifacts: Path) -> None:
        self.configs = {config.name: config for config in hosts}
        self.kept: list[Host] = []
        self._overrides = kernels
        self.artifacts = artifacts
        self._kernels: dict[str, Kernel] = {}
        self._live: dict[str, Host] = {}
        self._broken: dict[str, LabError] = {}
        self._boots = 0

    def kernel(self, name: str) -> Kernel:
        """The host's kernel, fetched or built on first use. Raises Broken."""
        if name not in self._kernels:
            override = self._overrides.get(name, self._overrides.get(""))
            self._kernels[name] = self._once(name, lambda: obtain(self.configs[name], override))
        return self._kernels[name]

    def host(self, name: str, make_plugin: Callable[[str], Plugin] | None = None) -> Host:
        """The live host of this name; with a plugin made for its QEMU, if one is asked for. Raises Broken.

        A host that runs without the plugin is replaced by one with it; one with it serves those that want none, too.
        """
        if name in self._broken:
            raise Broken(self._broken[name])
        host = self._live.get(name)
        lacks = host is not None and make_plugin is not None and host.machine.plugin is None
        if host is not None and (lacks or not (host.machine.alive and host.agent.usable)):
            self.discard(name)
            host = None
        if host is None:
            kernel = self.kernel(name)
            self._boots += 1
            logs = self.artifacts / "hosts" / f"{self._boots:02}-{name}"
            host = self._live[name] = self._once(name, lambda: self._boot(name, kernel, logs, make_plugin))
            if self.configs[name].has_kvm:
                try:
                    self._once(name, host.require_kvm)
                except Broken:
                    self.discard(name)
                    raise
        return host

    def _boot(self, name: str, kernel: Kernel, logs: Path, make_plugin: Callable[[str], Plugin] | None) -> Host:
        config = self.configs[name]
        plugin = make_plugin(config.board.qemu) if make_plugin else None
        return Host.boot(config, kernel, logs, plugin=plugin)

    def _once(self, name: str, action):
        """Do it, unless something failed for this host before; keep the first error."""
        if name in self._broken:
            raise Broken(self._broken[name])
        try:
            return action()
        except LabError as e:
            self._broken[name] = e
            raise Broken(e) from e

    def discard(self, name: str) -> None:
        """End this host's machine; the next test that needs the host gets a fresh one."""
        if (host := self._live.pop(name, None)) is not None:
            host.shutdown()

    def keep(self, name: str) -> Host | None:
        """Take the host out of the run and leave its machine as it is, with the gdbstub free."""
        if (host := self._live.pop(name, None)) is not None:
            host.machine.release_gdb()
            self.kept.append(host)
        return host

    def close(self) -> None:
        """End all machines."""
        hosts = [*self._live.values(), *self.kept]
        self._live.clear()
        self.kept.clear()
        with ExitStack() as stack:  # every one is ended, whatever another says
            for host in hosts:
                stack.callback(host.shutdown)
