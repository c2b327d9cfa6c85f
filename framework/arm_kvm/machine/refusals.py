"""Why QEMU refused to start a board, by what it printed on stderr."""

from __future__ import annotations

from arm_kvm.support.errors import LabError, PortBusy, QemuRefused, SetupError

#: Causes other than the board: QEMU's words, the error, its message and its remedy.
_CAUSES: tuple[tuple[str, type[LabError], str, str], ...] = (
    (
        "Could not set up host forwarding rule",
        PortBusy,
        "the port for ssh is in use on this machine",
        "choose another --ssh-port, or none to let the system choose",
    ),
    (
        "Cannot allocate memory",
        SetupError,
        "this machine does not give QEMU the memory of the board",
        "free some, raise its limit (`ulimit -v`), or give the board less in its host file",
    ),
    (
        "Too many open files",
        SetupError,
        "QEMU may not open as many files as it needs",
        "raise the limit of open files (`ulimit -n`)",
    ),
    (
        "could not load kernel",
        SetupError,
        "QEMU cannot read the kernel's image",
        "check that it still exists; the next run makes one of the cache anew",
    ),
    (
        "UNIX socket path",
        SetupError,
        "the path of the run directory is too long for a socket",
        "set XDG_RUNTIME_DIR, or TMPDIR, to a shorter one",
    ),
)


def refusal(stderr: str, evidence: str) -> LabError:
    """Return the error for a QEMU that exited before its QMP greeting, having printed ``stderr``."""
    for words, kind, message, remedy in _CAUSES:
        if words in stderr:
            return kind(message, remedy=remedy, evidence=evidence)
    first = next((line for line in stderr.splitlines() if "warning:" not in line), stderr)
    remedy = "correct the board in the host file"
    return QemuRefused(f"QEMU does not start this board: {first}", remedy=remedy, evidence=evidence)
