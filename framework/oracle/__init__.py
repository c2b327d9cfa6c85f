"""Holds machine and host against the model and returns verdicts.

``sight`` finds the tables from outside, ``judge`` says what is wrong with them, ``stage2`` is what a
test case reads, ``verdicts`` are the names and the diff, ``splats`` reads the kernel's own complaints.
"""

from .oracle import Oracle
from .verdicts import Kind, Violation

__all__ = ["Kind", "Oracle", "Violation"]
