"""The artifacts of a test in a folder of its own: its part of the logs, dumps of stage 2, traces, complaints."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from arm_kvm.machine.machine import Logs


class TestFolder:
    """The folder of one test. ``folder`` is created with the first file."""

    __test__ = False

    def __init__(self, root: Path, node_id: str) -> None:
        file, _, case = node_id.partition("::")
        path = Path(file or "elsewhere")  # pytest gives files outside its root folder no path
        name = re.sub(r"[^\w.\-]+", "_", f"{path.with_suffix('').name}.{case}").strip("_")
        self.folder = root / path.parent.name / name
        self._starts: dict[Path, int] = {}
        self.files: list[Path] = []

    def begin(self, logs: Logs, whole: bool = False) -> None:
        """Remove what an earlier run left, and note how long this machine's logs are.

        With ``whole``, :meth:`collect` copies them from their beginning instead.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self._starts = {} if whole else {path: path.stat().st_size for path in logs.all() if path.exists()}

    def collect(self, logs: Logs) -> None:
        """Copy what was appended to the logs since :meth:`begin`."""
        for path in logs.all():
            if path.exists() and path.stat().st_size > (start := self._starts.get(path, 0)):
                with path.open("rb") as f:
                    f.seek(start)
                    self.write(path.name, f.read())

    def write(self, name: str, data: bytes | str) -> Path:
        """Write a file of this name and return its path."""
        path = self.path(name)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def path(self, name: str) -> Path:
        """Return the path for a file of this name, which the caller is about to write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        self.files.append(path)
        return path
