"""Which QEMU runs a host's board: the installed one, a build of one's own, or the package of another Debian suite.

A package is unpacked into the cache with the libraries it needs, dynamic loader included, and started through that
loader. Nothing is installed, so that several versions can run side by side on one machine.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from arm_kvm.host.config import PROGRAMS, HostConfig
from arm_kvm.machine.emulator import Emulator
from arm_kvm.support import cache
from arm_kvm.support.apt import PrivateApt
from arm_kvm.support.errors import EmulatorError, PackageError, SetupError
from arm_kvm.support.paths import is_there, written_path
from arm_kvm.support.programs import run
from arm_kvm.support.progress import task

INSTALLED = "installed"
KIND = "emulators"
_PACKAGE = "qemu-system-arm"
_FORMAT = 1  #: raise it when what is taken from the packages changes
_BUILD_FOLDERS = (".", "build", "bin")


def fitted(config: HostConfig, chosen: str | None = None) -> HostConfig:
    """The host with the QEMU that ``--qemu`` (``chosen``) or its host file selects.

    Raises EmulatorError, SetupError, DiskFull.
    """
    what = _chosen(config, chosen)
    if what == INSTALLED:
        return config
    return replace(config, board=replace(config.board, qemu=obtain(config.board.qemu.program, what)))


def check(config: HostConfig, chosen: str | None = None) -> None:
    """Raise EmulatorError if it is clear, without fetching anything, that :func:`fitted` will fail."""
    what = _chosen(config, chosen)
    if what.startswith("deb:"):
        _suite(what)
    elif what != INSTALLED:
        _own(config.board.qemu.program, what)


def _chosen(config: HostConfig, chosen: str | None) -> str:
    """The value of ``--qemu``, else that of the host file, where a path is relative to that file."""
    if chosen is not None:
        return chosen
    own = config.emulator or INSTALLED
    if own == INSTALLED or own.startswith("deb:"):
        return own
    return str(config.path.parent / written_path(own, f"{config.path}: "))


def obtain(program: str, what: str) -> Emulator:
    """This QEMU program from ``what``: a path, or ``deb:SUITE``. Raises EmulatorError, SetupError, DiskFull."""
    emulator = _packaged(program, what) if what.startswith("deb:") else _own(program, what)
    try:
        _ = emulator.version
    except SetupError as e:
        raise EmulatorError(e.message, remedy=e.remedy, evidence=e.evidence) from e
    return emulator


# -- a build of one's own ------------------------------------------------------------------------------------------


def _own(program: str, what: str) -> Emulator:
    """The program at a path, or in the folder at that path. Raises EmulatorError."""
    path = written_path(what, "--qemu ").absolute()
    remedy = "give a QEMU program, the folder it was built in, deb:SUITE, or `installed`"
    if not what or not is_there(path):
        raise EmulatorError(f"--qemu {what!r}: there is no such file or folder", remedy=remedy)
    if path.is_dir():
        found = [path / folder / program for folder in _BUILD_FOLDERS if (path / folder / program).is_file()]
        if not found:
            raise EmulatorError(f"--qemu {what}: there is no {program} in the folder", remedy=remedy)
        path = found[0].resolve()
    elif path.name in PROGRAMS and path.name != program:
        remedy = "give the folder that has both, or name the host: --qemu HOST=PROGRAM"
        raise EmulatorError(f"--qemu {what}: this host's board needs {program}", remedy=remedy)
    if not os.access(path, os.X_OK) or not path.is_file():
        raise EmulatorError(f"--qemu {what}: {path} is not a program", remedy=remedy)
    return Emulator(program, (str(path),), what)


# -- the package of a Debian suite -----------------------------------------------------------------------------------


def _suite(what: str) -> str:
    suite = what.removeprefix("deb:")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", suite):
        raise EmulatorError(f"--qemu {what}: a Debian package of QEMU is written deb:SUITE, deb:trixie for example")
    return suite


def _packaged(program: str, what: str) -> Emulator:
    suite, architecture = _suite(what), _own_architecture()

    def make(out: Path, work: Path) -> cache.Meta:
        with task(f"{_PACKAGE} of {suite}, with its libraries"):
            version = _unpack(suite, architecture, work)
            for name in PROGRAMS:
                _keep(work / "root", name, out)
        return {"suite": suite, "version": version}

    folder = cache.obtain(KIND, cache.key_of(_FORMAT, architecture, suite), make).folder
    libraries = folder / "lib"
    (loader,) = libraries.glob("ld-linux*")
    return Emulator(program, (str(loader), "--library-path", str(libraries), str(folder / "bin" / program)), what)


def _own_architecture() -> str:
    if shutil.which("dpkg") is None:
        raise SetupError("dpkg is not installed: Debian's QEMU cannot be unpacked", remedy="use a Debian machine")
    return run(["dpkg", "--print-architecture"]).stdout.strip()


def _unpack(suite: str, architecture: str, work: Path) -> str:
    """Unpack the package and all its dependencies into work/root; returns the package's version."""
    debs, root = work / "debs", work / "root"
    for folder in (debs, root):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        apt = PrivateApt(work / "apt", architecture, suite)
        found = apt.fetch(lambda apt: apt.closure(_PACKAGE), debs)
    except PackageError as e:
        raise EmulatorError(f"no QEMU of {suite}: {e.message}", remedy=e.remedy, evidence=e.evidence) from e
    for deb in found:
        _tool(["dpkg-deb", "-x", str(deb), str(root)])
    return _tool(["dpkg-deb", "-f", str(next(debs.glob(f"{_PACKAGE}_*.deb"))), "Version"]).strip()


def _keep(root: Path, program: str, out: Path) -> None:
    """Copy the program, and the libraries that the suite's own dynamic loader finds for it."""
    for folder in ("bin", "lib"):
        (out / folder).mkdir(exist_ok=True)
    home = next(iter(root.glob("usr/lib/*/libc.so.6")), None) or next(iter(root.glob("lib/*/libc.so.6")), None)
    if home is None or not (root / "usr/bin" / program).is_file():
        raise EmulatorError(f"the package {_PACKAGE} of this suite has no {program} that can be run from a folder")
    loader = next(iter(home.parent.glob("ld-linux*.so.*")))
    path = f"{home.parent}:{root / 'usr/lib' / home.parent.name}"
    listing = _tool([str(loader), "--library-path", path, "--list", str(root / "usr/bin" / program)])
    shutil.copy(root / "usr/bin" / program, out / "bin" / program)
    shutil.copy(loader.resolve(), out / "lib" / loader.name)
    for library in re.findall(r"=> (/\S+)", listing):
        if not Path(library).is_relative_to(root):
            raise EmulatorError(f"the package {_PACKAGE} of this suite lacks a library: {library}")
        shutil.copy(library, out / "lib" / Path(library).name)


def _tool(argv: list[str]) -> str:
    """Run an unpacker and return its output. Raises EmulatorError, SetupError, DiskFull."""
    done = run(argv)
    if done.returncode:
        raise EmulatorError(f"{Path(argv[0]).name} cannot unpack QEMU's package", evidence=done.stderr.strip())
    return done.stdout
