"""Remember Ctrl-C, for the code that it interrupts may raise another exception in place of KeyboardInterrupt."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

_heard = False


def listen() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, and :func:`heard` reports it."""
    _serve(_interrupt)


def leave_when_heard(code: int) -> None:
    """From now on Ctrl-C ends this process with this exit code."""

    def leave(*_: object) -> None:
        raise SystemExit(code)

    _serve(leave)


def _serve(handler: Callable[..., None]) -> None:
    """Install the handler, unless SIGINT is ignored or this is not the main thread."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def heard() -> bool:
    """Whether Ctrl-C was pressed."""
    return _heard


def check() -> None:
    """Raise KeyboardInterrupt again if Ctrl-C was pressed: another exception may have replaced the first."""
    if _heard and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt


def _interrupt(*_: object) -> None:
    global _heard
    _heard = True
    raise KeyboardInterrupt


def deaf() -> None:
    """Ignore Ctrl-C from now on: all that is left is a short clean-up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
