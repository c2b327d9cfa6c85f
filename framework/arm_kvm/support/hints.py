"""Suggestions for a word that a user has misspelt."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def hint(word: str, known: Iterable[str], listed: str, cutoff: float = 0.6) -> str:
    """For an unknown word, suggest the nearest known one, or list them all, introduced by ``listed``."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else f"{listed}: {', '.join(known)}"
