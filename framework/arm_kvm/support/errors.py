"""Every error the lab raises, in one tree. Each class says whose fault it is.

::

    LabError
     +-- ConfigError          2  a host file or an option is wrong (the user's)
     +-- SetupError           3  a program or package is missing on this machine
     |    +-- Unending            ... a program of it does not end
     +-- KernelError          4  a kernel cannot be had, or cannot be used
     |    +-- Offline         5    ... because ARM_KVM_OFFLINE forbids the download
     |    +-- DownloadFailed  6    ... because the server did not deliver it
     |    +-- ArchiveSilent  34    ... because Debian's archive cannot be reached
     |    +-- WrongChecksum   7    ... because what it delivered is something else
     |    +-- BuildFailed     8    ... because it did not compile
     |    +-- NoKvm           9    ... because it boots, but has no KVM in it
     +-- EmulatorError       31  a QEMU cannot be had, or is not one for this host
     +-- NoProbe             32  the recorder's probe cannot be had for this QEMU
     +-- PackageError        33  Debian's archive does not have a package
     |    +-- NoArchive           ... cannot be reached, or does not deliver
     +-- RootfsError         10  the root file system cannot be made
     +-- DiskFull            11  a disk is full: the cache's, or another
     +-- CacheUnusable       25  the cache cannot be written
     +-- LimitReached        35  this machine gives the lab too few files, processes, bytes
     +-- MachineError        12  QEMU itself
     |    +-- QemuRefused    13    ... did not accept the board
     |    +-- PortBusy       14    ... could not have the port for ssh
     |    +-- QemuDied       15    ... ended while the lab needed it
     |    |    +-- QemuKilled      ... because somebody else ended it: another may live
     |    +-- ProgramSilent  26    ... runs, but the conformance program in it does not answer
     +-- HostError           16  the Linux on the board
     |    +-- HostPanic      17    ... panicked
     |    +-- HostOops       18    ... oopsed, or hit a BUG
     |    +-- HostLockup     19    ... a CPU or task hangs, says its own watchdog
     |    +-- HostSilent     20    ... did not reach the next boot state in time
     |    +-- SshUnreachable 21    ... does not answer on ssh
     +-- AgentError          22  the agent inside the host
     |    +-- AgentTimeout   23    ... gave no answer before the request's deadline
     |    +-- AgentFault          ... failed with an exception of its own
     |    +-- HostOsError         ... a system call answered with an errno
     +-- NoLiveMachine       24  a command needs a running machine, and none runs
     +-- NonConformance      27  the reference model and the emulated CPU differ
     +-- TraceError          28  a saved trace cannot be read, or the kernel's lacks events
     +-- ProtocolViolation   29  a trace breaks the rules of VMIDs and TLB maintenance
     +-- SequenceFailed      30  a replayed sequence: the host is not as the models say

Catch a meaning (``except KernelError``), not an enumeration of causes. The number is the
exit code of ``arm-kvm``; pytest keeps its own.
"""

from __future__ import annotations

import errno as errno_names
import os


class LabError(Exception):
    """The root. ``str()`` is one message with its cause; ``remedy`` says what to do about it."""

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
    exit_code = 2


class SetupError(LabError):
    exit_code = 3


class Unending(SetupError):
    """A program did not end in time, and was ended."""


class KernelError(LabError):
    exit_code = 4


class Offline(KernelError):
    exit_code = 5


class DownloadFailed(KernelError):
    exit_code = 6


class ArchiveSilent(KernelError):
    exit_code = 34


#: What keeps a kernel from here though nobody has made a mistake: a case that needs it is skipped.
UNAVAILABLE = (Offline, DownloadFailed, ArchiveSilent)


class WrongChecksum(KernelError):
    exit_code = 7


class BuildFailed(KernelError):
    exit_code = 8


class NoKvm(KernelError):
    exit_code = 9


class EmulatorError(LabError):
    exit_code = 31


class NoProbe(LabError):
    """What records cannot run; everything else can."""

    exit_code = 32


class PackageError(LabError):
    """There is no such suite, or no such package in it."""

    exit_code = 33


class NoArchive(PackageError):
    """The index of a suite cannot be read now, or a package is not delivered: another time may do."""


class RootfsError(LabError):
    exit_code = 10


class DiskFull(LabError):
    exit_code = 11


class CacheUnusable(LabError):
    exit_code = 25


class LimitReached(LabError):
    exit_code = 35


class MachineError(LabError):
    exit_code = 12


class QemuRefused(MachineError):
    exit_code = 13


class PortBusy(MachineError):
    exit_code = 14


class QemuDied(MachineError):
    exit_code = 15


class QemuKilled(QemuDied):
    """By SIGKILL or SIGTERM: a person, or this machine for want of memory."""


class HoldFailed(MachineError):
    """A CPU did not come to where a test was to hold it, or was held there for too long."""

    exit_code = 36


class ProgramSilent(MachineError):
    exit_code = 26


class HostError(LabError):
    exit_code = 16


class HostPanic(HostError):
    exit_code = 17


class HostOops(HostError):
    exit_code = 18


class HostLockup(HostError):
    exit_code = 19


class HostSilent(HostError):
    exit_code = 20


class SshUnreachable(HostError):
    exit_code = 21


class AgentError(LabError):
    exit_code = 22


class AgentTimeout(AgentError):
    exit_code = 23


class AgentFault(AgentError):
    """The agent raised; ``evidence`` is its own traceback, from inside the host."""


class HostOsError(AgentError):
    """A system call inside the host failed. ``errno`` is the host's number (same names on all Arm Linux)."""

    def __init__(self, call: str, errno: int) -> None:
        self.call = call
        self.errno = errno
        name = errno_names.errorcode.get(errno, str(errno))
        super().__init__(f"{call}: {name} ({os.strerror(errno)})")


class NoLiveMachine(LabError):
    exit_code = 24


class NonConformance(LabError):
    exit_code = 27


class TraceError(LabError):
    """A saved trace cannot be read (the message names the file and the line), or the kernel's lacks events."""

    exit_code = 28


class ProtocolViolation(LabError):
    """The hypervisor broke the rules of VMIDs and TLB maintenance, says a recorded trace."""

    exit_code = 29


class SequenceFailed(LabError):
    """A replayed sequence ended with a host that is not as the models say."""

    exit_code = 30
