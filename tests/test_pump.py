"""The console's pump: single bytes that the lab does not read do not block QEMU, and no line is lost."""

import socket
import time

from arm_kvm.machine.console import Console
from arm_kvm.machine.pump import Pump


def test_many_single_bytes_do_not_block_the_writer(tmp_path):
    qemu, lab = socket.socketpair()
    end = Pump(lab, tmp_path / "log").end
    qemu.settimeout(5.0)
    for n in range(20_000):
        qemu.send(bytes([n % 251]))
    qemu.shutdown(socket.SHUT_WR)
    end.settimeout(5.0)
    got = bytearray()
    while data := end.recv(65536):
        got += data
    assert got == (tmp_path / "log").read_bytes() == bytes(n % 251 for n in range(20_000))
    qemu.close()
    end.close()


def test_a_socket_alone_would_block():
    """Why there is a pump; if this fails, it is no longer needed."""
    qemu, lab = socket.socketpair()
    qemu.setblocking(False)
    sent = 0
    try:
        while sent < 20_000:
            sent += qemu.send(b"x")
    except BlockingIOError:
        pass
    assert sent < 2_000
    qemu.close()
    lab.close()


def test_what_a_person_types_arrives(tmp_path):
    qemu, lab = socket.socketpair()
    end = Pump(lab, tmp_path / "log").end
    end.sendall(b"ls\n")
    qemu.settimeout(5.0)
    assert qemu.recv(16) == b"ls\n"
    end.close()
    assert qemu.recv(16) == b""


def test_a_line_that_was_polled_is_not_lost(tmp_path):
    """A boot waits for a line and, in turns, polls the machine, which reads what has arrived."""
    qemu, lab = socket.socketpair()
    console = Console(lab, tmp_path / "log")
    qemu.sendall(b"arm-kvm: init\r\narm-kvm: up\r\n")
    while console.lines_seen < 2:
        console.poll()
        time.sleep(0.01)
    qemu.sendall(b"later\r\n")
    assert list(console.lines(1.0)) == ["arm-kvm: init", "arm-kvm: up", "later"]
    assert list(console.lines(0)) == []
    qemu.close()
    console.close()
