"""Memory that failed: its signal, SIGBUS, reaches only whom it is for.

It stays blocked in all threads, but KVM_RUN lets it in (KVM_SET_SIGNAL_MASK), and the thread that ran the guest asks
for it: else one that came earlier would be taken for the guest's.
"""

import contextlib
import signal

_SIGNALS = {signal.SIGBUS}
_BUS_MCEERR_AR = 4  # "action required", include/uapi/asm-generic/siginfo.h


def keep_out():
    """Block it, in this thread and those it will start."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextlib.contextmanager
def let_in():
    """Within the block its handler takes it: with 6.12, not with 6.1, madvise(MADV_HWPOISON) signals its caller, and
    an agent that blocked it answered no more.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def wanted():
    """Whether KVM has told this thread that its guest wants memory that failed (kvm_send_hwpoison_signal).

    What tells of memory that nobody wants yet (BUS_MCEERR_AO) is passed over.
    """
    codes = set()
    while (told := signal.sigtimedwait(_SIGNALS, 0)) is not None:
        codes.add(told.si_code)
    return _BUS_MCEERR_AR in codes
