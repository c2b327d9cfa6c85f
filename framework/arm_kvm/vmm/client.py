"""The agent's client: requests with deadlines, errors as exceptions, a log of every exchange."""

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

#: Seconds between checks of the machine while the lab waits for an answer, so that a panic is noticed early.
_SLICE = 0.2
_DEFAULT_DEADLINE = 20.0
_GRACE = 1.0
_LOG_WIDTH = 300


P = ParamSpec("P")
R = TypeVar("R")
op = object.__new__(Operations)  #: names the agent's operations in requests; none of them is called on this side


@dataclass(frozen=True)
class Request(Generic[R]):
    """An operation of the agent with its arguments. ``R`` is the type of its result."""

    name: str
    args: dict[str, Any]
    blob: bytes = b""


@cache
def _signature(operation: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """Return the operation's name on the wire and the names of its parameters."""
    names = (name for name in dir(Operations) if getattr(op, name) == operation)
    return next(names), tuple(signature(operation).parameters)


def request(operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Request[R]:
    """Make a request to be sent later or in a batch: ``request(op.vm_destroy, vm=3)``. mypy checks its arguments."""
    name, parameters = _signature(operation)
    arguments: dict[str, Any] = dict(zip(parameters, args, strict=False)) | kwargs
    return Request(name, arguments, arguments.pop("blob", b""))


class Listener:
    """Is notified of the requests to an agent: ``before`` and ``after`` each one, and ``answered`` for each exchange.

    ``after`` and ``answered`` are not called when the answer is an error. This class does nothing.
    """

    def before(self, request: Request[Any]) -> None: ...

    def after(self, request: Request[Any], result: object) -> None: ...

    def answered(self, name: str) -> None: ...


class Line(Protocol):
    """A connection to an agent."""

    @property
    def stream(self) -> socket.socket | paramiko.Channel:
        """Carries bytes in both directions."""
        ...

    def over(self) -> bool:
        """Return whether the agent is known to have ended."""
        ...

    def last_output(self) -> str:
        """Return the output that may explain why the agent ended."""
        ...

    def close(self) -> None: ...


class SshLine:
    """The ssh channel through which an agent was started."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self.stream: socket.socket | paramiko.Channel = channel
        self._channel = channel

    def over(self) -> bool:
        return bool(self._channel.eof_received)

    def last_output(self) -> str:
        return self._channel.recv_stderr(65536).decode(errors="replace")

    def close(self) -> None:
        with suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.close()


class SerialLine:
    """The virtio serial port of the agent that started with the host: twice as fast as ssh.

    An agent that is killed may leave half a message in the port, so agents that are started later use ssh.
    """

    def __init__(self, machine: Machine) -> None:
        self.stream: socket.socket | paramiko.Channel = machine.port
        self._machine = machine
        self._opened = False

    def over(self) -> bool:
        """Return whether the port was open in the host and is not any more: it does not report an end of file."""
        self._opened, before = self._machine.port_open, self._opened
        return before and not self._opened

    def last_output(self) -> str:
        return "Last console lines:\n" + self._machine.console.tail()

    def close(self) -> None:
        """Do nothing: the machine closes its port."""


def result_of(reply: dict[str, Any], blob: bytes) -> Any:
    """Return the result in a reply. Raises HostOsError or AgentFault when the operation failed."""
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
    """A connection to an agent, for one request at a time.

    ``agent(op.vm_create, ipa_bits=0)`` makes a request. Raises HostOsError (a system call failed in the host),
    AgentFault, AgentTimeout, or what ended the machine (HostPanic, QemuDied, ...).
    """

    def __init__(self, line: Line, log: Path, check: Callable[[], None], timeout: float) -> None:
        self._line = line
        self._stream = line.stream
        self._stream.settimeout(_SLICE)
        self._log = log.open("w", encoding="utf-8", buffering=1)
        self._check = check
        self._buffer = bytearray()
        self._next = 0
        self.recent: deque[str] = deque(maxlen=10)  #: the last exchanges, for reports
        self.listener = Listener()
        self.suffix = ""  #: appended to the names of its VMs, when it is not the host's only VMM
        self._broken: AgentError | None = None
        self._meanwhile: Callable[[], None] | None = None
        self.hello: dict[str, Any] = self.ask(request(op.hello), timeout)

    def __call__(self, operation: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Make a request and return its result."""
        return self.ask(request(operation, *args, **kwargs))

    def ask(self, wanted: Request[R], deadline: float = _DEFAULT_DEADLINE) -> R:
        """Make a request, to be answered within ``deadline`` seconds, and return its result."""
        return self.begin(wanted)(deadline)

    def begin(self, wanted: Request[R]) -> Callable[[float], R]:
        """Make a request and return a function that waits for its result, with a deadline in seconds as argument."""
        self.listener.before(wanted)
        number = self.send(wanted)

        def result(deadline: float = _DEFAULT_DEADLINE) -> R:
            found: R = self.receive(number, deadline)
            self.listener.after(wanted, found)
            self.listener.answered(wanted.name)
            return found

        return result

    def batch(self, requests: Sequence[Request[Any]], deadline: float = _DEFAULT_DEADLINE) -> list[Any]:
        """Make several requests in one exchange and return their results. Raises what the first failure raises."""
        for one in requests:
            self.listener.before(one)
        wire_form = [(one.name, one.args) for one in requests]
        results: list[Any] = self.receive(self.send(request(op.batch, wire_form)), deadline)
        for one, result in zip(requests, results, strict=True):
            self.listener.after(one, result)
        self.listener.answered("batch")
        return results

    def meanwhile(self, do: Callable[[], None]) -> None:
        """Call ``do`` once while the next request is carried out, when the lab is otherwise idle."""
        self._meanwhile = do

    def send(self, wanted: Request[Any]) -> int:
        """Send a request without notifying the listener and return its id, for :meth:`receive`."""
        interrupt.check()
        self.require()
        self._next += 1
        message = {"id": self._next, "op": wanted.name, "args": wanted.args}
        self._note(f"> {self._next} {wanted.name} {wanted.args} {_bytes(wanted.blob)}")
        self._write(memoryview(wire.encode(message, wanted.blob)))
        return self._next

    def _write(self, data: memoryview) -> None:
        """Send all of ``data``. Raises AgentTimeout when the agent does not read it, or what ended the machine."""
        end = time.monotonic() + _DEFAULT_DEADLINE
        while len(data):
            try:
                data = data[self._stream.send(data) :]  # type: ignore[arg-type]  # a Channel, too, takes any buffer
            except TimeoutError:
                self._check()
                if time.monotonic() > end:
                    self._lose(AgentTimeout("the agent does not read its request"))
            except (OSError, EOFError, paramiko.SSHException) as e:
                self._check_again()
                self._lose(AgentError(f"the agent's connection is closed: {e}"))

    def receive(self, number: int, deadline: float = _DEFAULT_DEADLINE) -> Any:
        """Wait up to ``deadline`` seconds for the answer to this request. Also raises what :meth:`meanwhile` caught."""
        failure = self._do_meanwhile()
        end = time.monotonic() + deadline
        reply, blob = wire.decode(lambda size: self._read(size, end, deadline))
        self._note(f"< {reply} {_bytes(blob)}")
        if reply.get("id") != number:
            self._lose(AgentError(f"the agent answered request {reply.get('id')}, not {number}"))
        if failure is not None:
            raise failure
        return result_of(reply, blob)

    def _do_meanwhile(self) -> Exception | None:
        """Call ``do`` and return its exception, to be raised when the answer, which must not stay unread, is read."""
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
                self._lose(AgentError("the agent ended", evidence=self._line.last_output()))
            self._buffer += data
        out = bytes(self._buffer[:size])
        del self._buffer[:size]
        return out

    def _check_again(self) -> None:
        """Check the machine repeatedly: if its end closed the connection, that may take a moment to be noticed."""
        end = time.monotonic() + _GRACE
        while time.monotonic() < end:
            self._check()
            time.sleep(_GRACE / 20)

    def _lose(self, error: AgentError) -> NoReturn:
        """Raise ``error``, and accept no more requests: a late answer would be taken for that to the next one."""
        self._broken = error
        raise error

    @property
    def bits(self) -> int:
        """Width of the host's registers, 32 or 64."""
        return 64 if self.hello["machine"] == "aarch64" else 32

    @property
    def from_boot(self) -> bool:
        """Whether the agent started with the host."""
        return isinstance(self._line, SerialLine)

    @property
    def usable(self) -> bool:
        """Whether requests can be made: the connection is not broken."""
        return self._broken is None

    def require(self) -> None:
        """Raise the error that broke the connection, if it is broken."""
        if self._broken is not None:
            raise self._broken

    def _note(self, line: str) -> None:
        line = line[:_LOG_WIDTH]
        self.recent.append(line)
        if not self._log.closed:
            self._log.write(f"{time.monotonic():.4f} {line}\n")

    def close(self) -> None:
        self._line.close()
        self._log.close()
