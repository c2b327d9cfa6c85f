"""SIGBUS for memory failures (hwpoison), delivered only to the thread whose guest touched the memory.

SIGBUS is blocked in all threads. KVM_RUN unblocks it (KVM_SET_SIGNAL_MASK), and after KVM_RUN the thread takes the
pending signal. With a handler, an earlier SIGBUS could be mistaken for one that the guest caused.
"""

from __future__ import annotations

import contextlib
import signal
import struct
from collections.abc import Iterable, Iterator

from . import libc

_SIGNALS = {signal.SIGBUS}
_BUS_MCEERR_AR = 4  # "action required", include/uapi/asm-generic/siginfo.h
_FAULT = struct.Struct("@3iPh")  # siginfo_t of a fault: signo, errno, code, si_addr, si_addr_lsb


def block() -> None:
    """Block SIGBUS in this thread and the threads that it will start."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextlib.contextmanager
def unblocked() -> Iterator[None]:
    """Within the block, SIGBUS goes to a handler that ignores it.

    In 6.12, unlike 6.1, madvise(MADV_HWPOISON) signals its caller, and an agent that blocked SIGBUS stopped answering.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def take(signals: Iterable[int]) -> list[list[int]]:
    """Take those of ``signals`` that are pending for this thread: [si_signo, si_code, si_addr, si_addr_lsb] each."""
    taken = []
    while (info := libc.sigtimedwait(signals)) is not None:
        number, _, code, address, lsb = _FAULT.unpack_from(info)
        taken.append([number, code, address, lsb])
    return taken


def of_guest() -> list[int]:
    """Take the SIGBUS that KVM sent this thread because its guest accessed failed memory, as :func:`take` returns it.

    [] when there is none (kvm_send_hwpoison_signal). Signals for failed memory that has not been accessed
    (BUS_MCEERR_AO) are dropped.
    """
    found = [info for info in take(_SIGNALS) if info[1] == _BUS_MCEERR_AR]
    return found[0] if found else []
