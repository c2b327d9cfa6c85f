"""Boot as a sequence of named states, each with a timeout and an event that shows that it was reached.

kernel   the kernel wrote its first line on the console
init     the lab's init runs (images/init prints a line)
network  dropbear listens (images/init prints a line)
agent    the agent, which init has started, answered its first request

A restored host has the last state only. The ssh connection is opened on first use.
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
    """The states reached so far, and when: seconds since QEMU was started."""

    started: float = field(default_factory=time.monotonic)
    reached: dict[str, float] = field(default_factory=dict)

    def reach(self, state: str) -> None:
        self.reached[state] = time.monotonic() - self.started


def _await_line(machine: Machine, state: str, timeout: float) -> None:
    """Read the console until the state's line. Raises HostSilent, KernelError, or how the machine was lost."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        # In slices, to notice a QEMU that dies without closing its console.
        for line in machine.console.lines(min(left, 0.5)):
            if _CONSOLE_STATES[state].search(line):
                return
            if lacks := _NO_DRIVER.search(line):
                raise KernelError(
                    f"the kernel boots, but has no driver {lacks[1]}, which the lab needs to reach the host",
                    remedy="build it in, or name its module in the host file's `modules`",
                )
            if time.monotonic() > deadline:
                break
        machine.check()
    quiet = "no sign of it on the console" if machine.console.lines_seen else "nothing at all on the console"
    raise HostSilent(
        f"the host did not reach boot state {state!r} within {timeout:.0f} s: {quiet}",
        remedy=f"see the console below; raise timeouts.{state} in the host file if the host is only slow",
    )


def bring_up(machine: Machine, timeouts: dict[str, float], progress: Progress) -> Agent:
    """Wait for all states. Every error carries console, command line and QEMU's stderr as evidence."""
    with _evidence(machine):
        for state in _CONSOLE_STATES:
            _await_line(machine, state, timeouts[state])
            progress.reach(state)
        return greet(machine, timeouts, progress)


def greet(machine: Machine, timeouts: dict[str, float], progress: Progress) -> Agent:
    """Connect to the agent that init has started, and wait for its first answer."""
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
    """Start another agent, reached over ssh, and wait for its first answer."""
    path = machine.logs.folder / log if log else machine.logs.agent
    return Agent(SshLine(ssh.open(_AGENT_COMMAND)), path, machine.check, timeout)
