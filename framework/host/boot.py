"""Boot as a sequence of named states, each with a timeout and an event that only a living host produces.

kernel   the kernel wrote its first line on the console
init     our init runs (images/init says so)
network  dropbear listens (images/init says so)
ssh      an ssh session is open: the host's key is the pinned one, ours is accepted
agent    the agent answered its first request
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from framework.errors import HostSilent, LabError
from framework.machine.board import PORT
from framework.machine.machine import Machine

from .agent import Agent
from .rootfs import AGENT_HOME, Rootfs
from .ssh import Ssh

_AGENT_COMMAND = f"cd /{AGENT_HOME} && exec python3 -E -S -m agent"
_CONSOLE_STATES = {
    "kernel": re.compile(r"."),
    "init": re.compile(r"^arm-kvm: init"),
    "network": re.compile(r"^arm-kvm: up"),
}


@dataclass
class Progress:
    """States reached so far and the seconds since QEMU was started at which each was."""

    started: float = field(default_factory=time.monotonic)
    reached: dict[str, float] = field(default_factory=dict)

    def reach(self, state: str) -> None:
        self.reached[state] = time.monotonic() - self.started


def _await_line(machine: Machine, state: str, timeout: float) -> None:
    """Read the console until the state's line. Raises HostSilent, or the machine's own end."""
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        # Slices, so that a QEMU that dies without closing its console is seen too.
        for line in machine.console.lines(min(left, 0.5)):
            if _CONSOLE_STATES[state].search(line):
                return
            if time.monotonic() > deadline:
                break
        machine.check()
    quiet = "nothing at all on the console" if not machine.console.lines_seen else "no sign of it on the console"
    raise HostSilent(
        f"the host did not reach boot state {state!r} within {timeout:.0f} s: {quiet}",
        remedy=f"see the console below; raise timeouts.{state} in the host file if the host is only slow",
    )


def bring_up(machine: Machine, rootfs: Rootfs, timeouts: dict[str, float], progress: Progress) -> tuple[Ssh, Agent]:
    """Wait through all states. Every error carries console, command line and QEMU's stderr."""
    try:
        for state in _CONSOLE_STATES:
            _await_line(machine, state, timeouts[state])
            progress.reach(state)
        ssh = Ssh.connect(machine.ssh_port, rootfs.client_key, rootfs.host_key, timeouts["ssh"], machine.check)
        progress.reach("ssh")
        agent = start_agent(machine, ssh, timeouts["agent"], PORT)
        progress.reach("agent")
        return ssh, agent
    except LabError as e:
        if not e.evidence:
            e.evidence = machine.evidence()
        raise


def start_agent(machine: Machine, ssh: Ssh, timeout: float, port: str = "", log: str = "") -> Agent:
    """Start an agent and wait for its first answer.

    The first has the board's serial ``port`` to itself, twice as fast as ssh; what it leaves there when it is
    killed would confuse another, so later ones speak over ssh.
    """
    channel = ssh.open(f"{_AGENT_COMMAND} {port}".strip())
    path = machine.logs.folder / log if log else machine.logs.agent
    return Agent(channel, path, machine.check, timeout, machine.port if port else None)
