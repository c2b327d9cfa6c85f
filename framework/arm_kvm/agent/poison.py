"""Memory that failed: its signal, SIGBUS, reaches only whom it is for.

It stays blocked in all threads, but KVM_RUN lets it in (KVM_SET_SIGNAL_MASK), and the thread that ran the guest asks
for it: else one that came earlier would be taken for the guest's.
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


def keep_out() -> None:
    """Block it, in this thread and those it will start."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextlib.contextmanager
def let_in() -> Iterator[None]:
    """Within the block its handler takes it: with 6.12, not with 6.1, madvise(MADV_HWPOISON) signals its caller, and
    an agent that blocked it answered no more.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def take(signals: Iterable[int]) -> list[list[int]]:
    """What is pending of these signals for this thread: [signal, code, address, lowest bit of the address] each."""
    taken = []
    while (info := libc.sigtimedwait(signals)) is not None:
        number, _, code, address, lsb = _FAULT.unpack_from(info)
        taken.append([number, code, address, lsb])
    return taken


def wanted() -> list[int]:
    """The signal by which KVM has told this thread that its guest wants memory that failed, as :func:`take` has it.

    [] when there is none (kvm_send_hwpoison_signal). What tells of memory that nobody wants yet (BUS_MCEERR_AO) is
    passed over.
    """
    found = [told for told in take(_SIGNALS) if told[1] == _BUS_MCEERR_AR]
    return found[0] if found else []
