"""ssh to the host, with paramiko: commands, files, and the channels of agents."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import paramiko

from arm_kvm.support.errors import SshUnreachable

_USER = "root"
_BANNER_TIMEOUT = 10.0
_RETRY = 0.05
_SLICE = 0.2
_CONSOLE_LAG = 0.2  #: seconds within which a message of the kernel reaches the console
_OOPS_LAG = 3.0  #: the same after a command was killed by a signal: printing an oops takes longer
_OPEN_TIMEOUT = 10.0
#: The cheapest strong cipher for an emulated CPU.
_CIPHERS = ("aes128-ctr",)


class Ssh:
    """One connection, with the host key pinned. ``check`` is called while waiting, to raise if the machine is lost."""

    def __init__(self, transport: paramiko.Transport, check: Callable[[], None]) -> None:
        self._transport = transport
        self._check = check

    @classmethod
    def connect(cls, port: int, client_key: Path, host_key: str, timeout: float, check: Callable[[], None]) -> Ssh:
        """Connect to 127.0.0.1:port within ``timeout`` seconds. Raises SshUnreachable."""
        deadline = time.monotonic() + timeout
        last: Exception | None = None
        while (left := deadline - time.monotonic()) > 0:
            check()
            try:
                return cls(_handshake(port, client_key, host_key, min(left, _BANNER_TIMEOUT)), check)
            except (OSError, EOFError, paramiko.SSHException) as e:
                last = e
                time.sleep(_RETRY)
        raise SshUnreachable(
            f"the host does not answer on ssh (127.0.0.1:{port}) within {timeout:.0f} s: {last}",
            remedy="check on the console whether dropbear started; raise timeouts.ssh in the host file if it is slow",
        )

    def run(self, command: str, timeout: float = 30.0, *, check: bool = True) -> str:
        """Run a shell command and return its output. Raises SshUnreachable if it fails (with ``check``) or hangs."""
        return self._execute(command if check else f"{command}; true", b"", timeout)

    def put(self, data: bytes, path: str, timeout: float = 30.0) -> None:
        """Write a file on the host."""
        self._execute(f"cat > '{path}'", data, timeout)

    def _execute(self, command: str, data: bytes, timeout: float) -> str:
        channel = self.open(command)
        with closing(channel), self._bounded(command, timeout):
            channel.set_combine_stderr(True)
            channel.sendall(data)
            channel.shutdown_write()
            output = b"".join(self._received(channel, command, timeout)).decode(errors="replace")
            status = channel.recv_exit_status()
        if status:
            self._blame_the_kernel(_CONSOLE_LAG if 0 < status < 128 else _OOPS_LAG)
            raise SshUnreachable(f"`{command}` failed with status {status}", evidence=output)
        return output

    def _blame_the_kernel(self, patience: float) -> None:
        """Wait ``patience`` seconds for an oops on the console, which would explain the failure, and raise it."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            time.sleep(_CONSOLE_LAG)
            self._check()

    @contextmanager
    def _bounded(self, command: str, timeout: float) -> Iterator[None]:
        """Close the connection some seconds after the deadline: some of paramiko's waits have no timeout."""
        watchdog = threading.Timer(timeout + 5.0, self._transport.close)
        watchdog.start()
        try:
            yield
        except (paramiko.SSHException, EOFError, OSError) as e:
            self._check()
            raise SshUnreachable(f"`{command}`: the ssh connection ended: {e}") from e
        finally:
            watchdog.cancel()

    def _received(self, channel: paramiko.Channel, command: str, timeout: float) -> Iterator[bytes]:
        """Yield what the command prints, until it ends; wait in slices, to notice a machine that is lost."""
        channel.settimeout(_SLICE)
        deadline = time.monotonic() + timeout
        while True:
            try:
                data = channel.recv(65536)
            except TimeoutError as e:
                self._check()
                if time.monotonic() > deadline:
                    raise SshUnreachable(f"`{command}` did not end within {timeout:.0f} s") from e
                continue
            if not data:
                return
            yield data

    def get(self, path: str) -> bytes:
        """Read a file of the host."""
        return self.run(f"cat '{path}'").encode()

    def open(self, command: str) -> paramiko.Channel:
        """Start a command and return its channel."""
        with self._bounded(command, _OPEN_TIMEOUT):
            channel = self._transport.open_session(timeout=_OPEN_TIMEOUT)
            channel.exec_command(command)
            return channel

    def close(self) -> None:
        self._transport.close()


def _handshake(port: int, client_key: Path, host_key: str, timeout: float) -> paramiko.Transport:
    sock = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport = paramiko.Transport(sock)
    transport.banner_timeout = transport.auth_timeout = timeout
    transport.get_security_options().ciphers = _CIPHERS
    try:
        transport.start_client(timeout=timeout)
        if transport.get_remote_server_key().get_base64() != host_key:
            raise SshUnreachable(
                "the host presents another ssh key than its root file system was made with",
                remedy="another program may be listening on that port; start the host again",
            )
        transport.auth_publickey(_USER, paramiko.ECDSAKey.from_private_key_file(str(client_key)))
    except BaseException:
        transport.close()
        raise
    return transport


def command_line(port: int, client_key: Path) -> str:
    """The ssh command line that opens a shell on the host."""
    options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    return f"ssh {options} -i {client_key} -p {port} {_USER}@127.0.0.1"
