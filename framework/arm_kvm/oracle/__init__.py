"""Holds machine and host against the model and returns verdicts.

``locator`` finds the tables from outside, ``judge`` says what is wrong with them, ``stage2`` is what a
test case reads, ``verdicts`` are the names and the diff, ``splats`` reads the kernel's own complaints.
"""

from arm_kvm.oracle.oracle import Oracle
from arm_kvm.oracle.verdicts import Verdict, Violation

__all__ = ["Oracle", "Verdict", "Violation"]
