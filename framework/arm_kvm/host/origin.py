"""What is found out once for all hosts that began as one: restored from the same snapshot, or one that booted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


class Origin:
    """Where hosts began; hosts restored from one snapshot have the same."""


class HasOrigin(Protocol):
    origin: Origin


H = TypeVar("H", bound=HasOrigin)


class Once(Generic[H, T]):
    """``find(host)``, called once for each origin: for what cannot differ between hosts that share it.

    Symbols, CPU features, page tables that were saved with the machine. The floor that asks keeps the answer.
    """

    def __init__(self, find: Callable[[H], T]) -> None:
        self._find = find
        self._found: WeakKeyDictionary[Origin, T] = WeakKeyDictionary()

    def __call__(self, host: H) -> T:
        if host.origin not in self._found:
            self._found[host.origin] = self._find(host)
        return self._found[host.origin]
