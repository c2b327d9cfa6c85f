"""Ctrl-C, remembered: what it interrupts may fail over it, and then that failure is what comes out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

_heard = False


def listen() -> None:
    """From here on KeyboardInterrupt is raised at Ctrl-C, and :func:`heard` says so."""
    _serve(_interrupt)


def leave_when_heard(code: int) -> None:
    """From here on Ctrl-C ends this process with this exit code."""

    def leave(*_: object) -> None:
        raise SystemExit(code)

    _serve(leave)


def _serve(handler: Callable[..., None]) -> None:
    """Unless Ctrl-C is ignored here, or this is no thread that hears it."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def heard() -> bool:
    """Whether Ctrl-C was pressed."""
    return _heard


def check() -> None:
    """Raise KeyboardInterrupt again after Ctrl-C: what failed over it may have put another exception in its place."""
    if _heard and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _heard
    _heard = True
    raise KeyboardInterrupt


def deaf() -> None:
    """Ignore Ctrl-C from here on: what is left to do is done in a moment, and guardians are at work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
