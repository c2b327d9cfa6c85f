"""Selects which case runs on which host, with which guests, and which cases share a host."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from arm_kvm.host import config as host_files
from arm_kvm.host.features import FEATURES
from arm_kvm.hosts.pool import EVERYBODY, Owner
from arm_kvm.pytest_plugin.stash import MUTANT, NEXT, POOL
from arm_kvm.support.hints import hint

ISOLATIONS = ("session", "module", "test")  #: which cases share a host: all of the run, all of a module, none


# -- what an item says of itself -----------------------------------------------------------------------------------


def fixtures_of(item: pytest.Item) -> Collection[str]:
    """The names of all fixtures that an item uses, directly or not."""
    names: Collection[str] = getattr(item, "fixturenames", ())
    return names


def parameters_of(item: pytest.Item) -> Mapping[str, Any]:
    """The values that an item is parametrised with, by name."""
    values: Mapping[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return values


def host_name(item: pytest.Item) -> str | None:
    """The host that a case runs on; None for a case without a host, and for one that suits none."""
    name = parameters_of(item).get("host")
    return name if isinstance(name, str) else None  # pytest has a placeholder for an empty set of parameters


def needs_host(item: pytest.Item) -> bool:
    return host_name(item) is not None


def records(item: pytest.Item) -> bool:
    """Whether a case uses the recorder."""
    return "recorder" in fixtures_of(item)


# -- collection ----------------------------------------------------------------------------------------------------


def _suits(config: host_files.HostConfig, definition: pytest.Item) -> bool:
    wanted = {name for mark in definition.iter_markers("needs") for name in mark.args}
    if definition.get_closest_marker("no_kvm"):
        return not config.has_kvm and wanted <= config.can
    return config.has_kvm and wanted <= config.can


def _guests(config: host_files.HostConfig, definition: pytest.Item) -> list[str]:
    """The guest instruction sets that a case runs with on this host."""
    only = definition.get_closest_marker("guests")
    isas = config.guests[:1] if definition.get_closest_marker("native") else config.guests
    return [isa for isa in isas if not only or isa in only.args]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a case with every host that it suits, and with the guest instruction sets it runs there."""
    _check_isolation(metafunc.definition)
    _check_features(metafunc.definition)
    if "host" not in metafunc.fixturenames:
        return
    suited = [c for c in metafunc.config.stash[POOL].configs.values() if _suits(c, metafunc.definition)]
    if "isa" not in metafunc.fixturenames:
        metafunc.parametrize("host", [c.name for c in suited], indirect=True)
        return
    pairs = [(c.name, isa) for c in suited for isa in _guests(c, metafunc.definition)]
    metafunc.parametrize(("host", "isa"), pairs, indirect=["host"], ids=[f"{h}-{i}" for h, i in pairs])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect cases that suit none of the chosen hosts, and slow ones unless --slow is given."""
    dropped = [item for item in items if _suits_nowhere(item) or _too_slow(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _check_isolation(definition: pytest.Item) -> None:
    mark = definition.get_closest_marker("isolation")
    if mark and mark.args not in [(one,) for one in ISOLATIONS]:
        said = ", ".join(map(repr, mark.args))
        raise pytest.Collector.CollectError(
            f"{definition.nodeid}: isolation({said}) is none of {', '.join(ISOLATIONS)}"
        )


def _check_features(definition: pytest.Item) -> None:
    for name in (name for mark in definition.iter_markers("feature") for name in mark.args):
        if name not in FEATURES:
            raise pytest.Collector.CollectError(
                f"{definition.nodeid}: feature({name!r}) is not known; {hint(name, FEATURES, 'one of')}"
            )


def _suits_nowhere(item: pytest.Item) -> bool:
    return "host" in fixtures_of(item) and host_name(item) is None


def _too_slow(item: pytest.Item) -> bool:
    return item.get_closest_marker("slow") is not None and not item.config.getoption("--slow")


# -- the run -------------------------------------------------------------------------------------------------------


def owner_of(item: pytest.Item) -> Owner:
    """Return the owner of this case's host: all cases with the same owner share it.

    The case's mark decides, else ``--isolation``. All cases that one mutant is tried with share a host.
    """
    if item.config.stash.get(MUTANT, False):
        return EVERYBODY
    if item.get_closest_marker("may_end_host"):
        return Owner(item.nodeid, alone=True)
    mark = item.get_closest_marker("isolation")
    match mark.args[0] if mark else item.config.getoption("--isolation"):
        case "test":
            return Owner(item.nodeid, alone=True)
        case "module":
            return Owner(item.nodeid.partition("::")[0])
    return EVERYBODY


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    item.stash[NEXT] = nextitem


def after(item: pytest.Item, count: int) -> list[pytest.Item]:
    """The tests after this one, at most ``count``. A worker of pytest-xdist knows of one only."""
    following = item.stash.get(NEXT, None)
    if following is None or hasattr(item.config, "workerinput"):
        return [following] if following is not None else []
    items = item.session.items
    at = items.index(following)
    return items[at : at + count]
