"""The lab's end of the agent: requests with deadlines, typed errors, a log of every exchange."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, Generic, NoReturn, ParamSpec, Protocol, TypeVar

import paramiko

from arm_kvm.agent import wire
from arm_kvm.agent.operations import Operations
from arm_kvm.machine.machine import Machine
from arm_kvm.support import interrupt
from arm_kvm.support.errors import AgentError, AgentFault, AgentTimeout, HostOsError

#: Between looks at the machine's health while an answer is awaited: a panic shows within this time.
_SLICE = 0.2
_DEFAULT_DEADLINE = 20.0
_GRACE = 1.0
_LOG_WIDTH = 300


P = ParamSpec("P")
R = TypeVar("R")
op = object.__new__(Operations)  #: names the agent's operations in requests; on this side none is carried out


@dataclass(frozen=True)
class Request(Generic[R]):
    """An operation of the agent with its arguments. ``R`` is what the agent answers."""

    name: str
    args: dict[str, Any]
    blob: bytes = b""


@cache
def _signature(operation: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """The operation's name on the wire, and its parameters."""
    names = (name for name in dir(Operations) if getattr(op, name) == operation)
    return next(names), tuple(signature(operation).parameters)


def request(operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Request[R]:
    """A request to be made later, or with others: ``request(op.vm_destroy, vm=3)``. Type checkers see the signature."""
    name, parameters = _signature(operation)
    arguments: dict[str, Any] = dict(zip(parameters, args, strict=False)) | kwargs
    return Request(name, arguments, arguments.pop("blob", b""))


class Listener:
    """Told of what the agent is asked: ``before`` and ``after`` each request, and once an answer came.

    The last two are not called when the answer is an error. This one does not listen.
    """

    def before(self, request: Request[Any]) -> None: ...

    def after(self, request: Request[Any], result: object) -> None: ...

    def answered(self, name: str) -> None: ...


class Line(Protocol):
    """The way to an agent."""

    stream: socket.socket | paramiko.Channel  #: carries bytes both ways

    def over(self) -> bool:
        """Whether the agent at the other end is known to be gone."""
        ...

    def said(self) -> str:
        """What it said of its end."""
        ...

    def close(self) -> None: ...


class SshLine:
    """The channel that an agent was started by."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self.stream: socket.socket | paramiko.Channel = channel
        self._channel = channel

    def over(self) -> bool:
        return self._channel.eof_received

    def said(self) -> str:
        return self._channel.recv_stderr(65536).decode(errors="replace")

    def close(self) -> None:
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()


class SerialLine:
    """The board's serial port, where the agent answers that the host began with: twice as fast as ssh.

    What it leaves there when it is killed would confuse another, so later agents speak over ssh.
    """

    def __init__(self, machine: Machine) -> None:
        self.stream: socket.socket | paramiko.Channel = machine.port
        self._machine = machine
        self._opened = False

    def over(self) -> bool:
        """The port carries no end of file, but QEMU knows whether somebody in the host has it open."""
        self._opened, before = self._machine.port_open, self._opened
        return before and not self._opened

    def said(self) -> str:
        return "Last console lines:\n" + self._machine.console.tail()

    def close(self) -> None:
        """The port is the machine's."""


def result_of(reply: dict[str, Any], blob: bytes) -> Any:
    """The result that a reply carries. Raises HostOsError, AgentFault: the operation failed."""
    if "errno" in reply:
        raise HostOsError(reply["call"], reply["errno"])
    if "fault" in reply:
        raise AgentFault("the agent failed; its own traceback follows", evidence=reply["fault"])
    if not reply["blob"]:
        return reply["ok"]
    return blob if reply["ok"] is None else (reply["ok"], blob)


def _bytes(blob: bytes) -> str:
    return f"+{len(blob)} B" if blob else ""


class Agent:
    """Requests to the agent, one at a time.

    ``agent(op.vm_create, ipa_bits=0)`` is a request; it raises HostOsError (an errno inside the host), AgentFault,
    AgentTimeout, or the machine's own end (HostPanic, QemuDied, ...) whichever shows first.
    """

    def __init__(self, line: Line, log: Path, check: Callable[[], None], timeout: float) -> None:
        self._line = line
        self._stream = line.stream
        self._stream.settimeout(_SLICE)
        self._log = log.open("w", encoding="utf-8", buffering=1)
        self._check = check
        self._buffer = bytearray()
        self._next = 0
        self.recent: deque[str] = deque(maxlen=10)  #: the last exchanges, for a report
        self.listener = Listener()
        self.suffix = ""  #: of the names of its VMs, when it is not the host's only VMM
        self._broken: AgentError | None = None
        self._meanwhile: Callable[[], None] | None = None
        self.hello: dict[str, Any] = self.ask(request(op.hello), timeout)

    def __call__(self, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """One request; its result."""
        return self.ask(request(operation, *args, **kwargs))

    def ask(self, wanted: Request[R], deadline: float = _DEFAULT_DEADLINE) -> R:
        """One request, answered within ``deadline`` seconds; its result."""
        return self.begin(wanted)(deadline)

    def begin(self, wanted: Request[R]) -> Callable[[float], R]:
        """Make a request; call what is returned to wait for its result, so many seconds at most."""
        self.listener.before(wanted)
        number = self.send(wanted)

        def result(deadline: float = _DEFAULT_DEADLINE) -> R:
            found: R = self.receive(number, deadline)
            self.listener.after(wanted, found)
            self.listener.answered(wanted.name)
            return found

        return result

    def batch(self, requests: Sequence[Request[Any]], deadline: float = _DEFAULT_DEADLINE) -> list[Any]:
        """Several requests in one exchange; their results. Raises what the first that fails raises alone."""
        for one in requests:
            self.listener.before(one)
        wire_form = [(one.name, one.args) for one in requests]
        results: list[Any] = self.receive(self.send(request(op.batch, wire_form)), deadline)
        for one, result in zip(requests, results, strict=True):
            self.listener.after(one, result)
        self.listener.answered("batch")
        return results

    def meanwhile(self, do: Callable[[], None]) -> None:
        """Do this, once, while the next answer is on its way: the lab has a CPU to itself then."""
        self._meanwhile = do

    def send(self, wanted: Request[Any]) -> int:
        """Send a request that no listener hears of; :meth:`receive` takes its answer. Returns the request's id."""
        interrupt.check()
        self.require()
        self._next += 1
        message = {"id": self._next, "op": wanted.name, "args": wanted.args}
        self._say(f"> {self._next} {wanted.name} {wanted.args} {_bytes(wanted.blob)}")
        self._write(memoryview(wire.encode(message, wanted.blob)))
        return self._next

    def _write(self, data: memoryview) -> None:
        """Send it all, with patience for a slow host and none for a lost one."""
        end = time.monotonic() + _DEFAULT_DEADLINE
        while len(data):
            try:
                data = data[self._stream.send(data) :]
            except TimeoutError:
                self._check()
                if time.monotonic() > end:
                    self._lose(AgentTimeout("the agent does not take a request"))
            except (OSError, EOFError, paramiko.SSHException) as e:
                self._check_again()
                self._lose(AgentError(f"the agent's connection is closed: {e}"))

    def receive(self, number: int, deadline: float = _DEFAULT_DEADLINE) -> Any:
        """The answer to this request, within ``deadline`` seconds; what :meth:`meanwhile` was given may raise, too."""
        failure = self._do_meanwhile()
        end = time.monotonic() + deadline
        reply, blob = wire.decode(lambda size: self._read(size, end, deadline))
        self._say(f"< {reply} {_bytes(blob)}")
        if reply.get("id") != number:
            self._lose(AgentError(f"the agent answered request {reply.get('id')}, not {number}"))
        if failure is not None:
            raise failure
        return result_of(reply, blob)

    def _do_meanwhile(self) -> Exception | None:
        """What it failed with, to be raised when the answer is read: the next request would take it for its own."""
        do, self._meanwhile = self._meanwhile, None
        try:
            if do:
                do()
        except Exception as e:
            return e
        return None

    def _read(self, size: int, end: float, deadline: float) -> bytes:
        while len(self._buffer) < size:
            try:
                data = self._stream.recv(1 << 18)
            except TimeoutError:
                self._check()
                if time.monotonic() > end:
                    remedy = "the host may be hung: see its console log"
                    self._lose(AgentTimeout(f"the agent gave no answer within {deadline:.0f} s", remedy=remedy))
                if not self._line.over():
                    continue
                data = b""
            except OSError:
                data = b""
            if not data:
                self._check_again()
                self._lose(AgentError("the agent ended", evidence=self._line.said()))
            self._buffer += data
        out = bytes(self._buffer[:size])
        del self._buffer[:size]
        return out

    def _check_again(self) -> None:
        """The connection is gone; if it went with the machine, that may take a moment to show."""
        end = time.monotonic() + _GRACE
        while time.monotonic() < end:
            self._check()
            time.sleep(_GRACE / 20)

    def _lose(self, error: AgentError) -> NoReturn:
        """An answer may still come, but nobody can tell to which request: the connection is over."""
        self._broken = error
        raise error

    @property
    def bits(self) -> int:
        """Width of the host's registers, 32 or 64."""
        return 64 if self.hello["machine"] == "aarch64" else 32

    @property
    def from_boot(self) -> bool:
        """Whether it is the one that the host began with."""
        return isinstance(self._line, SerialLine)

    @property
    def usable(self) -> bool:
        return self._broken is None

    def require(self) -> None:
        """Raise what broke the connection, if something did."""
        if self._broken is not None:
            raise self._broken

    def _say(self, line: str) -> None:
        line = line[:_LOG_WIDTH]
        self.recent.append(line)
        if not self._log.closed:
            self._log.write(f"{time.monotonic():.4f} {line}\n")

    def close(self) -> None:
        self._line.close()
        self._log.close()
