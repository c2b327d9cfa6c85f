"""Failures that the plugin itself raises, where neither an assertion nor a checker in the test has failed."""

from __future__ import annotations

from collections.abc import Sequence

# pytest.fail.Exception and pytest.xfail.Exception; to a type checker those are variables, which cannot be base classes.
from _pytest.outcomes import Failed, XFailed

from arm_kvm.oracle.verdicts import Finding
from arm_kvm.support.errors import LabError
from arm_kvm.support.judged import Judged


class CausedFailure(Failed):
    """The test fails because of ``cause``, for which it is not to blame."""

    def __init__(self, words: str, cause: LabError) -> None:
        super().__init__(words, pytrace=False)
        self.cause = cause


class HostUnusable(CausedFailure):
    """There is no host to run the test on."""


class HostLost(CausedFailure):
    """The test passed, but its host is gone, or was lost while the test's VMs were destroyed."""

    def __init__(self, when: str, cause: LabError) -> None:
        super().__init__(f"{when}: {cause}", cause)


class Refused(CausedFailure):
    """This machine (a full disk, a limit), not the host and not the case, ends the test."""

    def __init__(self, cause: LabError) -> None:
        super().__init__(f"this machine does not let the test go on: {cause}", cause)


class ContractBroken(Failed, Judged):
    """The kernel under test broke the contract: found after the test, or while its VMs were destroyed."""

    __module__ = "builtins"  # as pytest does for its own: the report then shows the bare class name

    def __init__(self, when: str, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join([f"{when}:", *map(str, findings)]), pytrace=False)
        self.verdicts = frozenset(finding.verdict for finding in findings)


class VmsLeft(Failed):
    """The test's VMs could not be destroyed."""


class KnownDeath(XFailed):
    """A known fault took down the host: nothing is left to judge."""
