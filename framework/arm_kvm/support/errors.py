"""Every error that the lab raises, in one tree. The docstring of each class says what went wrong.

Catch a meaning (``except KernelError``), not a list of causes. ``exit_code`` is the exit code of ``arm-kvm``; a class
without one of its own has its parent's. pytest keeps its own exit codes.
"""

from __future__ import annotations

import errno as errno_names
import os


class LabError(Exception):
    """The root of the tree. ``str()`` gives the message, its remedy and the evidence."""

    exit_code = 1

    def __init__(self, message: str, *, remedy: str = "", evidence: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.evidence = evidence

    def __str__(self) -> str:
        parts = [self.message]
        if self.remedy:
            parts.append(f"Remedy: {self.remedy}")
        if self.evidence:
            parts.append(self.evidence)
        return "\n".join(parts)

    @property
    def one_line(self) -> str:
        """Message and remedy on one line, for the summary of a run."""
        text = self.message.splitlines()[0]
        return f"{text} - {self.remedy}" if self.remedy else text


class ConfigError(LabError):
    """A host file, an option or an argument is wrong: the user's fault."""

    exit_code = 2


class SetupError(LabError):
    """A program or package is missing on this machine, or a file cannot be used."""

    exit_code = 3


class Unending(SetupError):
    """A program on this machine did not end in time, and was killed."""


class KernelError(LabError):
    """A kernel cannot be obtained, or cannot be used."""

    exit_code = 4


class Offline(KernelError):
    """ARM_KVM_OFFLINE forbids downloading a kernel."""

    exit_code = 5


class DownloadFailed(KernelError):
    """The server did not deliver the kernel."""

    exit_code = 6


class ArchiveSilent(KernelError):
    """Debian's archive is not reachable, or does not deliver a kernel package."""

    exit_code = 34


#: Why a kernel cannot be obtained for now, with no mistake made: cases that need it are skipped.
UNAVAILABLE = (Offline, DownloadFailed, ArchiveSilent)


class WrongChecksum(KernelError):
    """A kernel's tarball does not have the checksum that its host file gives."""

    exit_code = 7


class BuildFailed(KernelError):
    """A kernel does not build, or a patch to it does not apply."""

    exit_code = 8


class NoKvm(KernelError):
    """The kernel boots without KVM, or cannot be configured with it."""

    exit_code = 9


class EmulatorError(LabError):
    """A QEMU cannot be obtained, or does not suit this host."""

    exit_code = 31


class NoProbe(LabError):
    """The recorder's probe cannot be obtained for this QEMU; cases that record nothing still run."""

    exit_code = 32


class PackageError(LabError):
    """Debian has no such suite, or the suite has no such package."""

    exit_code = 33


class NoArchive(PackageError):
    """Debian's archive is not reachable, or does not deliver; try again later."""


class RootfsError(LabError):
    """The root file system cannot be made."""

    exit_code = 10


class DiskFull(LabError):
    """A disk is full: the one that holds the cache, or another."""

    exit_code = 11


class CacheUnusable(LabError):
    """The cache cannot be written."""

    exit_code = 25


class LimitReached(LabError):
    """This machine does not allow the lab enough open files, processes or memory."""

    exit_code = 35


class MachineError(LabError):
    """QEMU itself failed."""

    exit_code = 12


class QemuRefused(MachineError):
    """QEMU did not accept the board."""

    exit_code = 13


class PortBusy(MachineError):
    """The port for ssh is in use."""

    exit_code = 14


class QemuDied(MachineError):
    """QEMU ended while the lab needed it."""

    exit_code = 15


class QemuKilled(QemuDied):
    """QEMU was killed by SIGKILL or SIGTERM, perhaps by this machine's OOM killer."""


class HoldFailed(MachineError):
    """A CPU did not reach the instruction where a test wanted to hold it, or was held there for too long."""

    exit_code = 36


class ProgramSilent(MachineError):
    """The conformance program in QEMU does not answer."""

    exit_code = 26


class HostError(LabError):
    """The Linux on the board failed."""

    exit_code = 16


class HostPanic(HostError):
    """The host panicked."""

    exit_code = 17


class HostOops(HostError):
    """The host oopsed, or hit a BUG."""

    exit_code = 18


class HostLockup(HostError):
    """The host's own watchdog reports that a CPU or task hangs."""

    exit_code = 19


class HostSilent(HostError):
    """The host did not reach the next boot state in time."""

    exit_code = 20


class SshUnreachable(HostError):
    """The host does not answer on ssh."""

    exit_code = 21


class AgentError(LabError):
    """The agent inside the host failed."""

    exit_code = 22


class AgentTimeout(AgentError):
    """The agent did not answer before the request's deadline."""

    exit_code = 23


class AgentFault(AgentError):
    """The agent raised an exception; ``evidence`` is its traceback, from inside the host."""


class HostOsError(AgentError):
    """A system call inside the host failed. ``errno`` is the host's number."""

    def __init__(self, call: str, errno: int) -> None:
        self.call = call
        self.errno = errno
        name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{call}: {name} ({os.strerror(errno)})")


class NoLiveMachine(LabError):
    """A command needs a running machine, and none is running."""

    exit_code = 24


class NonConformance(LabError):
    """The reference model and the emulated CPU differ."""

    exit_code = 27


class TraceError(LabError):
    """A saved trace cannot be read (the message names file and line), or the kernel's trace lacks events."""

    exit_code = 28


class ProtocolViolation(LabError):
    """A recorded trace breaks the rules of VMIDs and TLB maintenance."""

    exit_code = 29


class SequenceFailed(LabError):
    """After a replayed sequence the host is not in the state that the models predict."""

    exit_code = 30
