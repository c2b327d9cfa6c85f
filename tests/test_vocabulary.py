"""The vocabulary of test authors: test cases import nothing else of the lab, and every name in it is explained."""

import ast
import inspect
from pathlib import Path

import pytest
from arm_kvm import vocabulary
from arm_kvm.support.paths import ROOT

CASES = sorted((ROOT / "testcases").rglob("*.py"))
SOURCE = Path(inspect.getfile(vocabulary))


def imported_modules(path):
    """The modules of the lab that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        yield from (name for name in names if name.partition(".")[0] == "arm_kvm")


def allowed(module):
    return module.split(".")[:2] in (["arm_kvm", "vocabulary"], ["arm_kvm", "testing"])


def imported_names(path):
    """What a file imports from the vocabulary, by the names that the vocabulary gives them."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "arm_kvm.vocabulary":
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", CASES, ids=lambda path: str(path.relative_to(ROOT / "testcases")))
def test_cases_import_only_the_vocabulary(path):
    assert [module for module in imported_modules(path) if not allowed(module)] == []
    assert set(imported_names(path)) <= set(vocabulary.__all__)


def test_most_cases_import_the_vocabulary():
    """The test above has something to look at."""
    assert sum("arm_kvm.vocabulary" in imported_modules(path) for path in CASES) > 30


def own_docstring(found):
    """The docstring that the object itself defines: not that of its type or base, nor a dataclass's signature."""
    if isinstance(found, type):
        text = vars(found).get("__doc__") or ""
        return "" if text.startswith(f"{found.__name__}(") else text
    return (found.__doc__ or "") if inspect.ismodule(found) or inspect.isroutine(found) else ""


def comments(path):
    """The lines of a file that end in a ``#:`` comment: the text before it, without the comment."""
    return [line.partition("#:")[0].strip() for line in path.read_text("utf-8").splitlines() if "#: " in line]


def origin(name):
    """The file in which a name of the vocabulary is assigned."""
    for node in ast.parse(SOURCE.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
            return Path(SOURCE.parent.parent / (node.module or "").replace(".", "/")).with_suffix(".py")
    raise AssertionError(f"the vocabulary does not import {name}")


@pytest.mark.parametrize("name", vocabulary.__all__)
def test_every_name_is_explained(name):
    """By a docstring, or by a ``#:`` comment behind its entry in ``__all__`` or behind its assignment."""
    explained = own_docstring(getattr(vocabulary, name))
    if not explained:
        assigned = [line for line in comments(origin(name)) if line.partition(" = ")[0].partition(":")[0] == name]
        explained = assigned or f'"{name}",' in comments(SOURCE)
    assert explained


def test_names_that_are_not_explained_are_found():
    class Inherited(ValueError):
        pass

    assert own_docstring(Inherited) == own_docstring(4096) == ""
    assert own_docstring(ast) and own_docstring(own_docstring) and own_docstring(Path)
