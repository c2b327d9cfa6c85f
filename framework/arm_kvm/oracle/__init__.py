"""Compares the machine's tables and the host's memory with the model, and returns verdicts.

``locator`` finds the tables from outside the host, ``judge`` finds what is wrong with them, ``witness`` judges one
operation of the host, ``stage2`` is a VM's tables as test cases read them, ``verdicts`` has the names and the diff,
``splats`` and ``ftrace`` read the kernel's log and trace.
"""

from arm_kvm.oracle.oracle import Oracle
from arm_kvm.oracle.verdicts import Verdict, Violation

__all__ = ["Oracle", "Verdict", "Violation"]
