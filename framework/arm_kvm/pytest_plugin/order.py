"""The order of a run, and its workers (``pytest -n N``, pytest-xdist).

Kernels, root file systems and snapshots are made once, under the cache's locks, whichever worker asks first; every
worker has machines of its own. Cases are handed out one by one, host by host (and module by module, where those have
a host of their own), those first that took longest in the last run: nobody is left waiting for a slow one at the end.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from itertools import chain

import pytest

from arm_kvm.pytest_plugin.selection import host_name, needs_host, owner_of, records
from arm_kvm.pytest_plugin.stash import POOL

_KEY = "arm-kvm/durations"
_TAIL = 40  #: lines of a console


def worker_of(config: pytest.Config) -> str:
    """``gw0``, or "" in a run without workers and in the process that hands out the cases."""
    return getattr(config, "workerinput", {}).get("workerid", "")


def parallel(config: pytest.Config) -> bool:
    """Whether this is a worker, or hands out the cases to workers."""
    return bool(worker_of(config) or getattr(config.option, "numprocesses", None))


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not worker_of(config):
        config.pluginmanager.register(_Durations(config))
    if config.getoption("maxschedchunk", None) is None:
        config.option.maxschedchunk = 1


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Host by host; those that record come last on theirs, which starts once more, with the probe in its QEMU.

    Where one process gives each case a host to itself, long and short ones are mixed: hosts are made during the long.
    """
    if config.getoption("--isolation") == "test" and not parallel(config):
        items.sort(key=lambda item: blake2b(item.nodeid.encode()).digest())
        return
    order = list(config.stash[POOL].configs)
    took = took_last(config)

    def place(item: pytest.Item) -> tuple:
        owner = owner_of(item)
        return (
            order.index(host_name(item)) if needs_host(item) else -1,
            "" if owner.alone else owner.name,  # a module's cases, where they share a host
            records(item),
            -took.get(item.nodeid, 0),
        )

    items.sort(key=place)


def took_last(config: pytest.Config) -> dict[str, float]:
    """Seconds of each case, or mutant, in the last run, by its name; nothing is known to a process without workers."""
    return getattr(config, "workerinput", {}).get(_KEY, {})


def _known(config: pytest.Config) -> dict[str, float]:
    cache = getattr(config, "cache", None)  # not with -p no:cacheprovider
    return cache.get(_KEY, {}) if cache else {}


class _Durations:
    """Remembers how long each case took, for the next run; all workers of this one hear the same of the last."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._last: dict[str, float] | None = None
        self._took: Counter[str] = Counter()

    def pytest_configure_node(self, node) -> None:
        if self._last is None:
            self._last = _known(self._config)
        node.workerinput[_KEY] = self._last

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":  # what it took to set up may be a host that others have used, too
            self._took[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        if getattr(self._config, "cache", None):
            self._config.cache.set(_KEY, _known(self._config) | {n: round(s, 2) for n, s in self._took.items()})


def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """A worker died: what its machine said last goes with the test that it ran."""
    worker = report.node.gateway.id
    artifacts = report.node.config.stash[POOL].artifacts
    found = (artifacts.glob(f"{where}hosts/{worker}-*/console.log") for where in ("", "mutants/*/"))
    logs = sorted(chain.from_iterable(found), key=lambda path: path.stat().st_mtime)
    if logs:
        lines = logs[-1].read_text(errors="replace").splitlines()[-_TAIL:]
        report.sections.append((f"last console lines ({logs[-1]})", "\n".join(lines)))
