"""One folder a test: its own part of the logs, the stage-2 dumps, what went wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from arm_kvm.machine.machine import Logs


class TestFolder:
    """``folder`` is made when the first file goes in."""

    __test__ = False

    def __init__(self, root: Path, node_id: str) -> None:
        file, _, case = node_id.partition("::")
        path = Path(file or "elsewhere")  # pytest has no path for a file outside its root folder
        name = re.sub(r"[^\w.\-]+", "_", f"{path.with_suffix('').name}.{case}").strip("_")
        self.folder = root / path.parent.name / name
        self._marks: dict[Path, int] = {}
        self.files: list[Path] = []

    def begin(self, logs: Logs, whole: bool = False) -> None:
        """Remember where this machine's logs stand (or have the whole), and forget what an earlier run left here."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._marks = {} if whole else {path: path.stat().st_size for path in logs.all() if path.exists()}

    def collect(self, logs: Logs) -> None:
        """Copy what the logs have grown by since :meth:`begin`."""
        for path in logs.all():
            if path.exists() and path.stat().st_size > (start := self._marks.get(path, 0)):
                with path.open("rb") as f:
                    f.seek(start)
                    self.write(path.name, f.read())

    def write(self, name: str, data: bytes | str) -> Path:
        """A file of this name; its path."""
        path = self.path(name)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def path(self, name: str) -> Path:
        """Where a file of this name goes; it counts as written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        self.files.append(path)
        return path
