"""Attaches the user's terminal to a host's console, in raw mode, until Ctrl-]."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import time
import tty
from collections.abc import Callable

_DYING = 5.0  #: seconds from the end of a machine's console to the end of its process
_ESCAPE = b"\x1d"  # Ctrl-]


def attach(console: socket.socket, alive: Callable[[], bool]) -> None:
    """Connect this terminal to the console. Returns on Ctrl-], or when the machine has ended.

    If standard input is no terminal, the console is printed until Ctrl-C or the end of the machine.
    """
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    saved = termios.tcgetattr(keyboard) if keyboard is not None else None
    try:
        if keyboard is not None:
            tty.setraw(keyboard)
        _shuttle(console, keyboard, alive)
    finally:
        if keyboard is not None and saved is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, saved)


def _await_end(alive: Callable[[], bool]) -> None:
    """Wait for the machine's process: it has closed the console, but cannot be reaped until it has exited."""
    deadline = time.monotonic() + _DYING
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)


def _shuttle(console: socket.socket, keyboard: int | None, alive: Callable[[], bool]) -> None:
    sources: list[socket.socket | int] = [console] if keyboard is None else [console, keyboard]
    while alive():
        ready, _, _ = select.select(sources, [], [], 0.5)
        if console in ready:
            data = console.recv(4096)
            if not data:
                _await_end(alive)
                return
            os.write(sys.stdout.fileno(), data)
        if keyboard is not None and keyboard in ready:
            data = os.read(keyboard, 4096)
            if _ESCAPE in data:
                return
            console.sendall(data)
