"""The probe's shared library, compiled for the plugin API that a QEMU speaks.

Every QEMU takes a range of API versions and says which when it refuses a plugin; it is asked once, and the library is
kept for it in the cache.
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
_SOURCES = (_HERE / "probe.c", _HERE / "plugin_api.h")
_NEWEST = 7  #: API version that the probe knows
_TOO_NEW = 999
_TIMEOUT = 30.0  #: seconds; QEMU answers in some 50 ms
#: What the probe says when it is loaded without its arguments: it was found good, and its symbols were there.
_LOADED = "arm-kvm probe: cannot map its memory"
_REMEDY = "choose another QEMU with --qemu, deb:SUITE for example"


def obtain(qemu: Emulator) -> Path:
    """The library for this QEMU. Raises NoProbe, SetupError (no such QEMU), DiskFull."""
    sources = [path.read_bytes() for path in _SOURCES]
    entry = cache.obtain("probe", cache.key_of(*sources, *qemu.identity), lambda out, work: _make(qemu, out, work))
    return entry.folder / "probe.so"


def _make(qemu: Emulator, out: Path, work: Path) -> dict:
    asked = _load(qemu, _compile(_TOO_NEW, work / "asks.so"))
    newest = re.search(r"supports only up to version (\d+)", asked)
    if newest is None:
        raise NoProbe(f"{qemu.name} takes no TCG plugins", remedy=_REMEDY, evidence=asked)
    api = min(int(newest[1]), _NEWEST)
    said = _load(qemu, _compile(api, out / "probe.so"))
    if _LOADED not in said:
        raise NoProbe(
            f"{qemu.name} speaks version {newest[1]} of the plugin API, the recorder's probe up to {_NEWEST}: "
            "it is not taken",
            remedy=_REMEDY,
            evidence=said,
        )
    return {"qemu": qemu.name, "api": api}


def _compile(api: int, library: Path) -> Path:
    """Raises NoProbe."""
    if shutil.which("gcc") is None:
        raise NoProbe("gcc is not installed: the recorder's probe cannot be compiled", remedy="run `arm-kvm setup`")
    how = ["-O2", "-Wall", "-shared", "-fPIC", "-fvisibility=hidden", f"-DAPI={api}"]
    done = run(["gcc", *how, "-o", str(library), str(_SOURCES[0])])
    if done.returncode:
        raise NoProbe("gcc does not compile the recorder's probe", evidence=done.stderr)
    return library


def _load(qemu: Emulator, plugin: Path) -> str:
    """What QEMU says of a plugin that does not stay in it."""
    argv = [*qemu.command, "-machine", "none", "-nodefaults", "-display", "none", "-plugin", str(plugin)]
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT).stderr
    except subprocess.TimeoutExpired as e:
        raise NoProbe(f"{qemu.name} does not say whether it takes plugins", remedy=_REMEDY) from e
