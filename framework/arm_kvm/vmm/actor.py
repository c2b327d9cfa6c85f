"""Actors: threads of the VMM that carry out an operation while the agent goes on answering the lab.

With :meth:`arm_kvm.host.host.Host.hold`, an actor makes a race between two system calls of one VMM deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

from arm_kvm.support.errors import AgentTimeout
from arm_kvm.vmm.client import Agent, Request, op, request, result_of

P = ParamSpec("P")
R = TypeVar("R")
_SLICE = 0.25


class Job(Generic[R]):
    """An operation that an actor carries out."""

    def __init__(self, agent: Agent, actor: int, name: str) -> None:
        self._agent, self._actor, self._name = agent, actor, name
        self._reply: tuple[dict[str, Any], bytes] | None = None

    def done(self, seconds: float = 0.0) -> bool:
        """Return whether the operation has ended; wait up to ``seconds`` for that."""
        if self._reply is None:
            self._reply = self._agent(op.actor_wait, actor=self._actor, seconds=seconds)
        return self._reply is not None

    def result(self, seconds: float = 20.0) -> R:
        """Return the operation's result. Raises what the operation raises, and AgentTimeout after ``seconds``."""
        for _ in range(max(1, round(seconds / _SLICE))):
            if self.done(_SLICE) and self._reply is not None:
                found: R = result_of(*self._reply)
                return found
        raise AgentTimeout(f"{self._name} did not end within {seconds:.0f} s", remedy="is its CPU held?")


class Actor:
    """A thread of the VMM, bound to a CPU of the host if one is given."""

    def __init__(self, agent: Agent, cpu: int | None = None) -> None:
        self._agent = agent
        self._number = agent(op.actor_create, cpu=cpu)

    def begin(self, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Job[R]:
        """Start an operation of the agent: ``actor.begin(op.memory_advise, hva=..., ...)``.

        Raises HostOsError (EBUSY) while another is under way.
        """
        return self.do(request(operation, *args, **kwargs))

    def do(self, wanted: Request[R]) -> Job[R]:
        """Start the operation of this request. Raises HostOsError (EBUSY) while another is under way."""
        self._agent(op.actor_begin, actor=self._number, op=wanted.name, args=wanted.args, blob=wanted.blob)
        return Job(self._agent, self._number, wanted.name)

    def end(self) -> None:
        """End the thread. An operation that is still under way is given a second."""
        self._agent(op.actor_end, actor=self._number)
