"""The generated parts of the reference, each as Markdown. Every one raises NothingFound rather than be empty."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import takewhile
from pathlib import Path
from typing import Any

from arm_kvm import cli, pytest_plugin
from arm_kvm.conform import departures as known_departures
from arm_kvm.events.violations import TraceRule
from arm_kvm.host import config, keys
from arm_kvm.host.features import FEATURES
from arm_kvm.known_faults import KNOWN_FAULTS, KnownFault
from arm_kvm.model.kvm import notifier
from arm_kvm.mutants import catalogue
from arm_kvm.mutants.score import Fate
from arm_kvm.oracle.verdicts import Verdict
from arm_kvm.sequences.steps import StepKind
from arm_kvm.support import errors as error_tree
from arm_kvm.support.errors import LabError
from arm_kvm.support.paths import ROOT

from arm_kvm_reference import source
from arm_kvm_reference.source import NothingFound

Row = Sequence[str]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: Row, rows: Iterable[Row]) -> str:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    if not lines:
        raise NothingFound(f"no row for the table {' / '.join(head)}")
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines, ""])


def _definitions(items: Iterable[tuple[str, str]]) -> str:
    blocks = [f"{term}\n: {text.strip().replace(chr(10), chr(10) + '  ')}\n" for term, text in items]
    if not blocks:
        raise NothingFound("no definition")
    return "\n".join(blocks)


def _code(text: str) -> str:
    return f"`{text}`"


# -- verdicts -------------------------------------------------------------------------------------------------


def _members(kind: type[Enum]) -> Iterator[Row]:
    comments = source.members(kind)
    return ((_code(member.value), comments[member.name]) for member in kind)


def verdicts() -> str:
    return _table(("verdict", "what is wrong"), _members(Verdict))


def trace_rules() -> str:
    return _table(("rule", "what is wrong"), _members(TraceRule))


def fates() -> str:
    return _table(("fate", "what it means"), _members(Fate))


def departures() -> str:
    rows = ((_code(d.name), d.releases, d.qemu, d.architecture) for d in known_departures.ALL)
    return _table(("departure", "QEMU", "what QEMU does", "what the architecture says"), rows)


def notifier_table() -> str:
    """The model's own document, without its heading."""
    if not notifier.RULES:
        raise NothingFound("the notifier model has no rules")
    return notifier.document().partition("\n\n")[2]


def steps() -> str:
    if not list(StepKind):
        raise NothingFound("there is no kind of step")
    return "\n".join(["```text", *(kind.value for kind in StepKind), "```", ""])


# -- for test authors -----------------------------------------------------------------------------------------


def fixtures(where: str = "arm_kvm.pytest_plugin.fixtures") -> str:
    """Of a module, or of a file given by its path in the checkout."""
    path = ROOT / where if where.endswith(".py") else source.file_of(importlib.import_module(where))
    return _definitions((_code(one.name), source.markdown(one.doc)) for one in source.fixtures(path))


def marks() -> str:
    """What ``pytest --markers`` says with the plugin and the notifier cases, and does not say without them."""
    with_plugin, without = _marks("-p", "arm_kvm.pytest_plugin", "testcases/notifier"), _marks()
    mine = [mark for mark in with_plugin if mark not in without]
    return _table(("mark", "meaning"), ((_code(name), text) for name, text in mine))


def _marks(*arguments: str) -> list[tuple[str, str]]:
    argv = [sys.executable, "-m", "pytest", "--markers", "-c", "/dev/null", *arguments]
    plain = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    said = subprocess.run(argv, cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout
    return re.findall(r"^@pytest\.mark\.(.+?): (.*)$", said, re.M)


def features() -> str:
    return _table(("feature", "what brings it"), ((_code(name), one.source) for name, one in FEATURES.items()))


# -- command line ---------------------------------------------------------------------------------------------


def command_line() -> str:
    return "\n".join(_command(cli.parser()))


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A parser's section, and those of its subcommands, each on the same level."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    yield f"## `{parser.prog}`\n\n{parser.description or ''}\n"
    yield f"```text\n{parser.format_usage().strip()}\n```\n"
    actions = [action for action in parser._actions if action not in groups and action.dest != "help"]
    if actions:
        yield "\n".join([*(f"- {_code(_spelt(action))}{_help(parser, action)}" for action in actions), ""])
    if parser.epilog:
        yield f"```text\n{parser.epilog}\n```\n"
    for group in groups:
        for child in group.choices.values():
            yield from _command(child)


def _spelt(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest
    if not action.option_strings:
        return name
    takes = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(f"{option}{takes}" for option in action.option_strings)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "") % (vars(action) | {"prog": parser.prog})
    return f": {text}" if text else ""


class _Options:
    """Takes the place of pytest's parser, and remembers the options that the plugin adds."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def getgroup(self, *_: str) -> _Options:
        return self

    def addoption(self, name: str, *_: str, **how: Any) -> None:
        takes = how.get("metavar") or "|".join(how.get("choices", ()))
        self.rows.append((_code(f"{name} {takes}".strip()), how["help"]))


def pytest_options() -> str:
    seen = _Options()
    for module in pkgutil.iter_modules(pytest_plugin.__path__, f"{pytest_plugin.__name__}."):
        if add := getattr(importlib.import_module(module.name), "pytest_addoption", None):
            add(seen)
    return _table(("option", "meaning"), seen.rows)


def known_faults() -> str:
    """The registry, with the kernels that each fault is excused on and those that it was seen on."""
    head = ("name", "fault", "excused on", "seen on", "fixed by")
    return _table(head, map(_known_fault, KNOWN_FAULTS.values()))


def _known_fault(fault: KnownFault) -> Row:
    return _code(fault.name), fault.text, fault.kernels, fault.seen, _code(fault.commit) if fault.commit else ""


# -- hosts, errors, mutants -------------------------------------------------------------------------------


def hosts() -> str:
    """The host files that come with the lab, each with the comment that it begins with."""
    configs = [config.find(name) for name in config.host_names()]
    head = ("host", "board", "kernel", "guests", "can")
    table = _table(head, map(_host, configs))
    return table + "\n" + _definitions((_code(one.name), _first_comment(one.path)) for one in configs)


def _host(host: config.HostConfig) -> Row:
    board, kernel = host.board, host.kernel
    of = kernel.get("package") or Path(kernel.get("url") or kernel.get("path") or kernel.get("image") or "").name
    runs = f"`{board.qemu.program}`, {board.cpu} x{board.cpus}, {board.memory >> 20} MiB"
    return _code(host.name), runs, f"{kernel['source']}: {of}", " ".join(host.guests), " ".join(sorted(host.can))


def host_keys() -> str:
    def rows(of: dict[str, str]) -> Iterator[Row]:
        return ((_code(key), text) for key, text in of.items())

    parts = [_table(("key", "meaning"), rows(keys.TOP)), "**`board`**\n", _table(("key", "meaning"), rows(keys.BOARD))]
    for kind, of in keys.KERNEL.items():
        parts += [f"**`kernel`**, with `source: {kind}`\n"]
        marked = {key: text if key in keys.KERNEL_REQUIRED[kind] else f"{text} (optional)" for key, text in of.items()}
        parts += [_table(("key", "meaning"), rows(marked))]
    parts += ["**`can`**\n", _table(("capability", "meaning"), rows(keys.CAPABILITIES))]
    states = ((_code(state), f"{seconds:.0f}") for state, seconds in keys.TIMEOUTS.items())
    return "\n".join([*parts, "**`timeouts`**\n", _table(("boot state", "seconds by default"), states)])


def errors() -> str:
    """The tree, with exit codes."""

    def rows(kind: type[LabError], depth: int) -> Iterator[Row]:
        own = str(kind.exit_code) if "exit_code" in vars(kind) else ""
        yield f"{'&emsp;' * depth}{_code(kind.__name__)}", own, source.summary(vars(kind).get("__doc__"))
        for child in kind.__subclasses__():
            if child.__module__ == error_tree.__name__:
                yield from rows(child, depth + 1)

    return _table(("error", "exit code", "what went wrong"), rows(LabError, 0))


def mutants() -> str:
    """The catalogue, by area."""
    parts: list[str] = []
    loaded = catalogue.load()
    for path in sorted(catalogue.HOME.glob("*.yaml")):
        own = [mutant for mutant in loaded if mutant.area == path.stem]
        parts += [f"## {path.stem}\n", _first_comment(path), _table(("mutant", "fault", "origin"), map(_mutant, own))]
    counts = Counter(mutant.area for mutant in loaded)
    if not counts:
        raise NothingFound("the catalogue is empty")
    return "\n".join([f"{counts.total()} mutants in {len(counts)} areas.\n", *parts])


def _first_comment(path: Path) -> str:
    """The comment that a YAML file begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    text = " ".join(line.removeprefix("#").strip() for line in lines)
    if not text:
        raise NothingFound(f"{path} does not begin with a comment that says what it is")
    return text + "\n"


def _mutant(mutant: catalogue.Mutant) -> Row:
    notes = [f"Needs: {', '.join(sorted(mutant.needs))}."] if mutant.needs else []
    notes += [f"{word}: {text}." for word, text in (("Dies", mutant.dies), ("Survives", mutant.survives)) if text]
    return _code(mutant.name), " ".join([mutant.fault + ("." if notes else ""), *notes]), mutant.origin
