"""A person at the host's console: the terminal in raw mode, byte for byte, until Ctrl-]."""

from __future__ import annotations

import os
import select
import socket
import sys
import termios
import tty
from collections.abc import Callable

_ESCAPE = b"\x1d"  # Ctrl-]


def attach(console: socket.socket, alive: Callable[[], bool]) -> None:
    """Connect this terminal with the console; returns on Ctrl-], or when the machine is gone.

    Without a terminal on standard input, the console is printed and Ctrl-C (or the machine's end) ends it.
    """
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    saved = termios.tcgetattr(keyboard) if keyboard is not None else None
    try:
        if keyboard is not None:
            tty.setraw(keyboard)
        _shuttle(console, keyboard, alive)
    finally:
        if saved is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, saved)


def _shuttle(console: socket.socket, keyboard: int | None, alive: Callable[[], bool]) -> None:
    sources = [console] if keyboard is None else [console, keyboard]
    while alive():
        ready, _, _ = select.select(sources, [], [], 0.5)
        if console in ready:
            data = console.recv(4096)
            if not data:
                return
            os.write(sys.stdout.fileno(), data)
        if keyboard in ready:
            data = os.read(keyboard, 4096)
            if _ESCAPE in data:
                return
            console.sendall(data)
