"""Sphinx directives for the reference, which is generated from the code: ``{verdicts}``, ``{errors}``, ``{api}`` ..."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from arm_kvm_reference import pages
from arm_kvm_reference.source import NothingFound

_PAGES: dict[str, Callable[..., str]] = {
    "verdicts": pages.verdicts,
    "trace-rules": pages.trace_rules,
    "fates": pages.fates,
    "departures": pages.departures,
    "known-faults": pages.known_faults,
    "notifier-table": pages.notifier_table,
    "steps": pages.steps,
    "fixtures": pages.fixtures,
    "marks": pages.marks,
    "command-line": pages.command_line,
    "pytest-options": pages.pytest_options,
    "hosts": pages.hosts,
    "features": pages.features,
    "host-keys": pages.host_keys,
    "errors": pages.errors,
    "mutants": pages.mutants,
}


class Generated(SphinxDirective):
    """A directive that stands for Markdown made from the code."""

    optional_arguments = 1
    make: ClassVar[Callable[..., str]]

    def run(self) -> list[nodes.Node]:
        try:
            text = type(self).make(*self.arguments)
        except NothingFound as e:
            raise self.error(str(e)) from e
        return self.parse_text_to_nodes(text, allow_section_headings=True)


class Api(SphinxDirective):
    """``{api} MODULE``: all that the module's ``__all__`` names. Or, in its body, a class on each line.

    Those in the body are not made by their reader, so how they are made is left out.
    """

    optional_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        blocks = [_autodoc(name, made=False) for name in map(str.strip, self.content) if name]
        for module in self.arguments:
            blocks += [_autodoc(f"{module}.{name}") for name in importlib.import_module(module).__all__]
        if not blocks:
            raise self.error("no name to document")
        return self.parse_text_to_nodes("\n".join(["````{eval-rst}", *blocks, "````"]))


def _autodoc(name: str, made: bool = True) -> str:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, type):
        signature = "" if made and not issubclass(found, Enum) else "()"
        return f".. autoclass:: {name}{signature}\n   :members:\n   :undoc-members:\n"
    if isinstance(found, ModuleType):
        return f".. automodule:: {found.__name__}\n   :members:\n   :undoc-members:\n"
    if callable(found):
        return f".. autofunction:: {name}\n"
    return f".. py:data:: {attribute}\n{_value(found)}"


def _value(found: object) -> str:
    """The value of a constant, or of what kind an object is."""
    if isinstance(found, int):
        return f"   :value: {found:#x}\n"
    if isinstance(found, str | tuple):
        return f"   :value: {found!r}\n"
    return f"   :type: {type(found).__name__}\n"


def setup(app: Sphinx) -> dict[str, Any]:
    for name, make in _PAGES.items():
        app.add_directive(name, type(name, (Generated,), {"make": staticmethod(make)}))
    app.add_directive("api", Api)
    return {"parallel_read_safe": True}
