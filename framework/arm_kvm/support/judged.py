"""How a failure names the rules that the kernel broke, for code that must not parse its text."""

from __future__ import annotations


class Judged:
    """Mixin of the exceptions that blame the kernel.

    ``verdicts`` names the rules that it broke, by the values of enums such as the oracle's verdicts. It is empty where
    the kernel failed and no rule names the failure.
    """

    verdicts: frozenset[str] = frozenset()
