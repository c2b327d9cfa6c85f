"""Compile modules to .pyc files, which the lab stores in the root file system to make later boots faster."""

from __future__ import annotations

import os
import py_compile
from collections.abc import Iterable
from types import ModuleType


def compile_all(modules: Iterable[ModuleType]) -> tuple[list[tuple[str, int]], bytes]:
    """Compile these modules' sources: [(path, length), ...] and the .pyc files as one blob.

    The .pyc files are checked by hash, so that file time stamps, which change with the root file system, do not matter.
    """
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    files: list[tuple[str, int]] = []
    blob = b""
    for module in list(modules):
        source, cached = getattr(module, "__file__", None), getattr(module, "__cached__", None)
        if source and cached and source.endswith(".py"):
            source, cached = os.path.abspath(source), os.path.abspath(cached)
            py_compile.compile(source, cached, doraise=True, invalidation_mode=mode)
            with open(cached, "rb") as f:
                data = f.read()
            files.append((cached, len(data)))
            blob += data
    return files, blob
