"""Facts that are found out once for all hosts of the same origin: restored from one snapshot, or booted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class Origin:
    """Identifies a snapshot, or a booted host; all hosts restored from one snapshot have the same."""


class HasOrigin(Protocol):
    origin: Origin


H = TypeVar("H", bound=HasOrigin)


class Once(Generic[H, T]):
    """Caches ``find(host)`` for each origin, for facts that cannot differ between hosts of the same origin.

    Such facts are symbols, CPU features, and page tables that were saved with the machine.
    """

    def __init__(self, find: Callable[[H], T]) -> None:
        self._find = find
        self._found: WeakKeyDictionary[Origin, T] = WeakKeyDictionary()

    def __call__(self, host: H) -> T:
        if host.origin not in self._found:
            self._found[host.origin] = self._find(host)
        return self._found[host.origin]
