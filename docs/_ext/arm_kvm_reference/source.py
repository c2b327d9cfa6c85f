"""What the running code does not keep, read from its source: comments of members, docstrings of fixtures."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_COMMENT = re.compile(r"#:\s*(.*)")
_ROLE = re.compile(r":\w+:`~?([^`<>]+)`")


class NothingFound(Exception):
    """There is nothing to document where there has to be something."""


def markdown(docstring: str) -> str:
    """A docstring in Markdown: roles become code, a literal block is fenced."""
    return _ROLE.sub(r"`\1`", inspect.cleandoc(docstring))


def summary(docstring: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(markdown(docstring or "").partition("\n\n")[0].split())


def members(kind: type) -> dict[str, str]:
    """The names assigned in a class's body, each with its ``#:`` comment, which stands above it or behind it."""
    lines, _ = inspect.findsource(kind)
    tree = ast.parse("".join(lines))
    (body,) = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    assigned = [node for node in body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    found = {node.targets[0].id: _comment(lines, node) for node in assigned if isinstance(node.targets[0], ast.Name)}
    if lacking := [name for name, comment in found.items() if not comment]:
        raise NothingFound(f"{kind.__module__}.{kind.__name__}: no `#:` comment for {', '.join(lacking)}")
    return found


def _comment(lines: list[str], node: ast.stmt) -> str:
    last = lines[(node.end_lineno or node.lineno) - 1]
    if behind := _COMMENT.search(last[node.end_col_offset or 0 :]):
        return behind[1].strip()
    above: list[str] = []
    for line in reversed(lines[: node.lineno - 1]):
        if not (match := _COMMENT.fullmatch(line.strip())):
            break
        above.insert(0, match[1].strip())
    return " ".join(above)


@dataclass(frozen=True)
class Fixture:
    """A pytest fixture, as its source has it."""

    name: str
    doc: str


def fixtures(path: Path) -> Iterator[Fixture]:
    """The fixtures that a file defines, in its order. Those without a docstring are private to it."""
    functions = (node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef))
    for node in functions:
        if any(map(_makes_a_fixture, node.decorator_list)) and (doc := ast.get_docstring(node)):
            yield Fixture(node.name, doc)


def _makes_a_fixture(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(called) in ("pytest.fixture", "fixture")


def file_of(module: ModuleType) -> Path:
    """The source file of a module."""
    return Path(inspect.getfile(module))
