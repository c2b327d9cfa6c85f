"""The probe's shared library, compiled for a QEMU's version of the plugin API.

A QEMU accepts a range of API versions, and names them when it rejects a plugin. This is done once; then the library is
in the cache.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from arm_kvm.machine.emulator import Emulator
from arm_kvm.support import cache
from arm_kvm.support.errors import NoProbe
from arm_kvm.support.programs import run

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "probe.c", _HERE / "tables.c")
_HEADERS = (_HERE / "probe.h", _HERE / "plugin_api.h")
_NEWEST = 7  #: the newest API version that the probe can be compiled for
_TOO_NEW = 999
_TIMEOUT = 30.0  #: seconds; QEMU answers in some 50 ms
#: Message of a probe that is loaded without its arguments: QEMU has accepted its version and resolved its symbols.
_LOADED = "arm-kvm probe: cannot map its memory"
_REMEDY = "choose another QEMU with --qemu, deb:SUITE for example"


def obtain(qemu: Emulator) -> Path:
    """Return the library for this QEMU, compiled if need be. Raises NoProbe, SetupError (no such QEMU), DiskFull."""
    sources = [path.read_bytes() for path in (*_SOURCES, *_HEADERS)]
    entry = cache.obtain("probe", cache.key_of(*sources, *qemu.identity), lambda out, work: _make(qemu, out, work))
    return entry.folder / "probe.so"


def _make(qemu: Emulator, out: Path, work: Path) -> dict[str, object]:
    rejection = _load(qemu, _compile(_TOO_NEW, work / "asks.so"))
    newest = re.search(r"supports only up to version (\d+)", rejection)
    if newest is None:
        raise NoProbe(f"{qemu.name} takes no TCG plugins", remedy=_REMEDY, evidence=rejection)
    api = min(int(newest[1]), _NEWEST)
    messages = _load(qemu, _compile(api, out / "probe.so"))
    if _LOADED not in messages:
        raise NoProbe(
            f"{qemu.name} speaks version {newest[1]} of the plugin API, the recorder's probe up to {_NEWEST}: "
            "QEMU does not load it",
            remedy=_REMEDY,
            evidence=messages,
        )
    return {"qemu": qemu.name, "api": api}


def _compile(api: int, library: Path) -> Path:
    """Compile the probe for this API version. Raises NoProbe."""
    if shutil.which("gcc") is None:
        raise NoProbe("gcc is not installed: the recorder's probe cannot be compiled", remedy="run `arm-kvm setup`")
    how = ["-O2", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", f"-DAPI={api}"]
    done = run(["gcc", *how, "-o", str(library), *map(str, _SOURCES)])
    if done.returncode:
        raise NoProbe("gcc does not compile the recorder's probe", evidence=done.stderr)
    return library


def _load(qemu: Emulator, plugin: Path) -> str:
    """Start QEMU with a plugin that it rejects, or that fails to start, and return QEMU's messages. Raises NoProbe."""
    argv = [*qemu.command, "-machine", "none", "-nodefaults", "-display", "none", "-plugin", str(plugin)]
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT).stderr
    except subprocess.TimeoutExpired as e:
        raise NoProbe(f"{qemu.name} did not end within {_TIMEOUT:.0f} s of loading a plugin", remedy=_REMEDY) from e
