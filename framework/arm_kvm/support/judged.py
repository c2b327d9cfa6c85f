"""What a failure says about the kernel under test, for code that must not read its text."""

from __future__ import annotations


class Judged:
    """Mixin of the exceptions that blame the kernel.

    ``verdicts`` names the rules that it broke: members of enums whose values are these names. It is empty where the
    failure is the kernel's and no rule has a name for it.
    """

    verdicts: frozenset[str] = frozenset()
