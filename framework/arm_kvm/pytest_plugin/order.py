"""The order of a run, and its workers (``pytest -n N``, pytest-xdist).

Kernels, root file systems and snapshots are made once, under the cache's locks, by the worker that asks first; every
worker has machines of its own. Cases are handed out one by one, host by host (and module by module where each module
has a host of its own). Those that took longest in the last run come first, so that the run does not end with all
workers idle but one.
"""

from __future__ import annotations

from collections import defaultdict
from hashlib import blake2b
from itertools import chain
from typing import Protocol

import pytest

from arm_kvm.pytest_plugin.selection import host_name, owner_of, records
from arm_kvm.pytest_plugin.stash import POOL

_KEY = "arm-kvm/durations"
_TAIL = 40  #: lines of a console


def worker_of(config: pytest.Config) -> str:
    """The name of this worker, such as ``gw0``; "" without workers, and in the process that hands out the cases."""
    name: str = getattr(config, "workerinput", {}).get("workerid", "")
    return name


def parallel(config: pytest.Config) -> bool:
    """Whether this process is a worker, or hands out cases to workers."""
    return bool(worker_of(config) or getattr(config.option, "numprocesses", None))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not worker_of(config):
        config.pluginmanager.register(_Durations(config))
    if config.getoption("maxschedchunk", None) is None:
        config.option.maxschedchunk = 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort cases by host; on each, those that record come last, as they need another QEMU, with the probe loaded.

    Where one process gives each case a host of its own, the order is random, the same in every run: hosts for the next
    cases are made during the long ones, so those should not all be in one place.
    """
    if config.getoption("--isolation") == "test" and not parallel(config):
        items.sort(key=lambda item: blake2b(item.nodeid.encode()).digest())
        return
    order = list(config.stash[POOL].configs)
    took = took_last(config)

    def place(item: pytest.Item) -> tuple[int, str, bool, float]:
        owner, name = owner_of(item), host_name(item)
        return (
            -1 if name is None else order.index(name),
            "" if owner.alone else owner.name,  # a module's cases, where they share a host
            records(item),
            -took.get(item.nodeid, 0),
        )

    items.sort(key=place)


def took_last(config: pytest.Config) -> dict[str, float]:
    """Seconds that each case, or mutant, took in the last run, by node id; empty in a process that is no worker."""
    durations: dict[str, float] = getattr(config, "workerinput", {}).get(_KEY, {})
    return durations


def _known(config: pytest.Config) -> dict[str, float]:
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    return cache.get(_KEY, {}) if cache else {}


class _Node(Protocol):
    """What pytest-xdist's object for a worker is used for here."""

    workerinput: dict[str, object]


class _Durations:
    """Keeps how long each case took for the next run, and sends every worker the durations of the last."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._last: dict[str, float] | None = None
        self._took: defaultdict[str, float] = defaultdict(float)

    def pytest_configure_node(self, node: _Node) -> None:
        if self._last is None:  # workers that collect in different orders are refused by pytest-xdist
            self._last = _known(self._config)
        node.workerinput[_KEY] = self._last

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":  # the setup may include a host's start, which other cases profit from
            self._took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if cache := getattr(self._config, "cache", None):
            cache.set(_KEY, _known(self._config) | {n: round(s, 2) for n, s in self._took.items()})


def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """Add the last console lines of a worker that died to the report of the test that it ran."""
    worker = report.node.gateway.id
    artifacts = report.node.config.stash[POOL].artifacts
    found = (artifacts.glob(f"{where}hosts/{worker}-*/console.log") for where in ("", "mutants/*/"))
    logs = sorted(chain.from_iterable(found), key=lambda path: path.stat().st_mtime)
    if logs:
        lines = logs[-1].read_text(errors="replace").splitlines()[-_TAIL:]
        report.sections.append((f"last console lines ({logs[-1]})", "\n".join(lines)))
