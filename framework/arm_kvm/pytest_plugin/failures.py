"""How the plugin itself ends a test, where neither the test's own assertions nor a checker did."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from arm_kvm.oracle.verdicts import Finding
from arm_kvm.support.errors import LabError
from arm_kvm.support.judged import Judged


class CausedFailure(pytest.fail.Exception):
    """The test fails because of ``cause``, which is not of its making."""

    def __init__(self, words: str, cause: LabError) -> None:
        super().__init__(words, pytrace=False)
        self.cause = cause


class HostUnusable(CausedFailure):
    """There is no host to run the test on."""


class HostLost(CausedFailure):
    """The test passed, and its host is gone, or was lost when its VMs were destroyed."""

    def __init__(self, when: str, cause: LabError) -> None:
        super().__init__(f"{when}: {cause}", cause)


class Refused(CausedFailure):
    """This machine, not the host and not the case, is why the test ends."""

    def __init__(self, cause: LabError) -> None:
        super().__init__(f"this machine does not let the test go on: {cause}", cause)


class ContractBroken(pytest.fail.Exception, Judged):
    """The kernel under test broke the contract, says the oracle: after the test, or when its VMs were destroyed."""

    __module__ = "builtins"  # as pytest has it: the report names the class alone

    def __init__(self, when: str, findings: Sequence[Finding]) -> None:
        super().__init__("\n".join([f"{when}:", *map(str, findings)]), pytrace=False)
        self.verdicts = frozenset(finding.verdict for finding in findings)


class VmsLeft(pytest.fail.Exception):
    """The kernel, or the agent, did not let a VM go."""


class KnownDeath(pytest.xfail.Exception):
    """A known fault took the host along: there is nothing left to judge."""
