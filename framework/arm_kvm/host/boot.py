"""Boot as a sequence of named states, each with a timeout and an event that only a living host produces.

kernel   the kernel wrote its first line on the console
init     our init runs (images/init says so)
network  dropbear listens (images/init says so)
agent    the agent, which init has started, answered its first request

A restored host has the last state only. An ssh session is opened when somebody first wants one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from arm_kvm.host.rootfs import AGENT_HOME
from arm_kvm.host.ssh import Ssh
from arm_kvm.machine.machine import Machine
from arm_kvm.support.errors import HostSilent, KernelError, LabError
from arm_kvm.vmm.client import Agent, SerialLine, SshLine

_AGENT_COMMAND = f"cd /{AGENT_HOME} && exec python3 -E -S -m agent"
_CONSOLE_STATES = {
    "kernel": re.compile(r"."),
    "init": re.compile(r"^arm-kvm: init"),
    "network": re.compile(r"^arm-kvm: up"),
}
_NO_DRIVER = re.compile(r"^arm-kvm: no driver (\S+)")


@dataclass
class Progress:
    """States reached so far and the seconds since QEMU was started at which each was."""

    started: float = field(default_factory=time.monotonic)
    reached: dict[str, float] = field(default_factory=dict)

    def reach(self, state: str) -> None:
        self.reached[state] = time.monotonic() - self.started


def _await_line(machine: Machine, state: str, timeout: float) -> None:
    """Read the console until the state's line. Raises HostSilent, KernelError, or the machine's own end."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        # Slices, so that a QEMU that dies without closing its console is seen too.
        for line in machine.console.lines(min(left, 0.5)):
            if _CONSOLE_STATES[state].search(line):
                return
            if lacks := _NO_DRIVER.search(line):
                raise KernelError(
                    f"the kernel boots, but has no driver {lacks[1]}, which the lab reaches a host by",
                    remedy="build it in, or name its module in the host file's `modules`",
                )
            if time.monotonic() > deadline:
                break
        machine.check()
    quiet = "nothing at all on the console" if not machine.console.lines_seen else "no sign of it on the console"
    raise HostSilent(
        f"the host did not reach boot state {state!r} within {timeout:.0f} s: {quiet}",
        remedy=f"see the console below; raise timeouts.{state} in the host file if the host is only slow",
    )


def bring_up(machine: Machine, timeouts: dict[str, float], progress: Progress) -> Agent:
    """Wait through all states. Every error carries console, command line and QEMU's stderr."""
    with _evidence(machine):
        for state in _CONSOLE_STATES:
            _await_line(machine, state, timeouts[state])
            progress.reach(state)
        return greet(machine, timeouts, progress)


def greet(machine: Machine, timeouts: dict[str, float], progress: Progress) -> Agent:
    """The agent that the host began with, once it has answered."""
    with _evidence(machine):
        agent = Agent(SerialLine(machine), machine.logs.agent, machine.check, timeouts["agent"])
        progress.reach("agent")
        return agent


@contextmanager
def _evidence(machine: Machine) -> Iterator[None]:
    try:
        yield
    except LabError as e:
        e.evidence = e.evidence or machine.evidence()
        raise


def start_agent(machine: Machine, ssh: Ssh, timeout: float, log: str = "") -> Agent:
    """Start another agent, which speaks over ssh, and wait for its first answer."""
    path = machine.logs.folder / log if log else machine.logs.agent
    return Agent(SshLine(ssh.open(_AGENT_COMMAND)), path, machine.check, timeout)
