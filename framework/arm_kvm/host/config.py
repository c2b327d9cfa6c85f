"""Read and check host files (``configs/hosts/*.yaml``); errors name file and line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from arm_kvm.guest.isa import ISAS
from arm_kvm.host.keys import BOARD, CAPABILITIES, KERNEL, KERNEL_REQUIRED, TIMEOUTS, TOP
from arm_kvm.machine.board import Board
from arm_kvm.machine.emulator import Emulator
from arm_kvm.model.arch.regime import ARMV7, ARMV8, Architecture
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.hints import hint
from arm_kvm.support.paths import CONFIGS, plain_file, written_path

_SIZES = {"K": 10, "M": 20, "G": 30}
#: Some keys of ``kernel`` -> the pattern of their text, and what it is.
_SPELT = {
    "package": (r"[a-z0-9][a-z0-9+.-]+", "the name of a Debian package"),
    "suite": (r"[a-z0-9][a-z0-9.-]*", "the name of a Debian suite"),
    "url": (r"https?://[^/]+/.+", "a URL that begins with http:// or https:// and names a file"),
}
#: Debian's name of the architecture -> the kernel's name, and its translation regime's.
_ROOTFS = {"armhf": ("arm", ARMV7), "arm64": ("arm64", ARMV8)}
#: QEMU program -> root file systems that its boards can run: the 64-bit one has the 32-bit boards too.
PROGRAMS = {"qemu-system-arm": ("armhf",), "qemu-system-aarch64": ("arm64", "armhf")}
_CPUS_32 = ("cortex-a7", "cortex-a15")
#: COMMAND_LINE_SIZE, arch/arm and arch/arm64 include/uapi/asm/setup.h (5.4), including the terminating NUL.
_CMDLINE = {"arm": 1024, "arm64": 2048}
#: Kernel parameters that only the lab may set: with another root or init the host would never answer.
_RESERVED = ("root", "rdinit", "initrd", "noinitrd", "armkvm")
_APPENDED = len(" armkvm.shell")


@dataclass(frozen=True)
class HostConfig:
    """One host: its board, where its kernel comes from, its root file system, its capabilities."""

    name: str
    path: Path
    board: Board
    kernel: dict[str, Any]  #: the keys of the host file, checked: strings, and lists of strings (host/keys.py)
    rootfs: str
    cmdline: str
    can: frozenset[str]
    guests: tuple[str, ...]
    timeouts: dict[str, float] = field(default_factory=dict)
    emulator: str = ""  #: where QEMU comes from, as ``--qemu`` takes it; see framework/arm_kvm/host/emulators.py
    boot_afresh: str = ""  #: why this host is booted every time and never restored; "" if it may be restored

    @property
    def linux_arch(self) -> str:
        """The kernel's name of the architecture: arm or arm64."""
        return _ROOTFS[self.rootfs][0]

    @property
    def architecture(self) -> Architecture:
        """How to read the host's translation registers and tables."""
        return _ROOTFS[self.rootfs][1]

    @property
    def has_kvm(self) -> bool:
        """Whether the host file promises KVM."""
        return "kvm" in self.can


class Node:
    """A YAML mapping that knows the line of each of its keys."""

    def __init__(self, path: Path, node: yaml.Node, what: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: {what} must be a mapping of keys to values")
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: {what} has a key that is not text")
        self._path, self.what = path, what
        self._lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
        self._children = {key.value: value for key, value in node.value}
        self._here = node.start_mark.line + 1
        try:
            self.values: dict[str, Any] = yaml.SafeLoader("").construct_document(node)
        except (yaml.YAMLError, ValueError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path}:{self._here}: {what}: {getattr(e, 'problem', e)}") from e
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise self.wrong(name, f"{name!r} is there twice")
        for key in self.values:
            if key not in self._children:
                raise self.wrong(str(key), f"the key {key!r} is not text: quote it")

    def wrong(self, key: str, message: str) -> ConfigError:
        """Return the error for what is wrong at this key, or in the whole mapping if it has no such key."""
        return ConfigError(f"{self._path}:{self._lines.get(key, self._here)}: {message}")

    def check_keys(self, known: Collection[str], required: Iterable[str]) -> None:
        """Raise ConfigError for an unknown key, and for a required one that is missing."""
        for key in self.values:
            if key not in known:
                near = hint(str(key), known, "known keys", cutoff=0.5)
                raise self.wrong(key, f"unknown key {key!r} in {self.what}; {near}")
        for key in required:
            if key not in self.values:
                raise self.wrong(key, f"{self.what} lacks the key {key!r}")

    def child(self, key: str, what: str) -> Node:
        """The mapping at this key. Raises ConfigError."""
        return Node(self._path, self._children[key], what)

    def children(self, key: str, what: str) -> list[Node]:
        """The mappings of the list at this key. Raises ConfigError."""
        node = self._children[key]
        if not isinstance(node, yaml.SequenceNode):
            raise self.wrong(key, f"{key} is not a list")
        return [Node(self._path, item, what) for item in node.value]

    def one_of(self, key: str, choices: Collection[str]) -> str:
        """The text at this key, which must be one of ``choices``. Raises ConfigError."""
        value = self.values[key]
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"{key}: {self.written(key)} is not known; {hint(str(value), choices, 'one of')}")
        return value

    def integer(self, key: str, low: int, high: int, unit: str = "") -> int:
        """The number at this key, ``low`` to ``high`` inclusive. Raises ConfigError."""
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            what = f"a number from {low} to {high}{unit and f' ({unit})'}"
            raise self.wrong(key, f"{key}: {self.written(key)} is not {what}")
        return value

    def text(self, key: str, pattern: str = ".*", what: str = "") -> str:
        """The text at this key, which must match ``pattern``, described by ``what``. Raises ConfigError."""
        value = self.values[key]
        if not isinstance(value, str) or not value:
            raise self.wrong(key, f"{key}: {self.written(key)} is not text")
        if not re.fullmatch(pattern, value, re.S):
            raise self.wrong(key, f"{key}: {value!r} is not {what}")
        return value

    def names(self, key: str) -> list[str]:
        """The list of names at this key, without duplicates; empty if there is no such key. Raises ConfigError."""
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, f"{key}: {self.written(key)} is not a list of names")
        if twice := [name for name in value if value.count(name) > 1]:
            raise self.wrong(key, f"{key}: {twice[0]!r} is there twice")
        return value

    def written(self, key: str) -> str:
        """The value as it is written in the file: ``yes``, where Python has True."""
        value, node = self.values[key], self._children[key]
        if isinstance(value, str) or not isinstance(node, yaml.ScalarNode):
            return repr(value)
        return node.value or "nothing"


def _memory(node: Node) -> int:
    value = str(node.values["memory"])
    match = re.fullmatch(r"([0-9]+)([KMG])", value)
    if not match:
        raise node.wrong("memory", f"memory: {node.written('memory')} is not a size like 512M or 1G")
    size = int(match[1]) << _SIZES[match[2]]
    if not 128 << 20 <= size <= 64 << 30 or size % (2 << 20):
        raise node.wrong("memory", f"memory: {value} is not between 128M and 64G in steps of 2M")
    return size


def _board(node: Node, can: list[str]) -> Board:
    node.check_keys(BOARD, BOARD)
    qemu = node.one_of("qemu", PROGRAMS)
    machine = node.text("machine")
    size = _memory(node)
    options = machine.split(",")
    if "kvm" in can and "virtualization=on" not in options:
        raise node.wrong("machine", "an impossible board: the host can kvm, but the machine lacks virtualization=on")
    if qemu == "qemu-system-arm" and size > 3 << 30:
        raise node.wrong("memory", "an impossible board: a 32-bit board without highmem has room for 3G at most")
    most = 8 if "gic-version=2" in options else 64
    cpus = node.integer("cpus", 1, 64)
    if cpus > most:
        raise node.wrong("cpus", f"an impossible board: a GICv2 serves {most} CPUs at most, not {cpus}")
    return Board(Emulator.installed(qemu), machine, node.text("cpu"), cpus, size)


def _kernel(node: Node) -> dict[str, Any]:
    if "source" not in node.values:
        raise node.wrong("source", f"kernel lacks the key 'source' (one of: {', '.join(KERNEL)})")
    source = node.one_of("source", KERNEL)
    node.check_keys(("source", *KERNEL[source]), KERNEL_REQUIRED[source])
    for key in node.values:
        if key in ("fragments", "modules", "patches"):
            node.names(key)
        else:
            node.text(key, *_SPELT.get(key, ()))
    for module in node.names("modules"):
        if not re.fullmatch(r"[\w-]+\??", module):
            raise node.wrong("modules", f"modules: {module!r} is not the name of a module")
    if source == "tarball" and not re.fullmatch(r"[0-9a-f]{64}", node.values["sha256"].lower()):
        raise node.wrong("sha256", "sha256: not the 64 hexadecimal digits of a checksum")
    if source == "tarball" and ("url" in node.values) == ("path" in node.values):
        raise node.wrong("source", "a tarball kernel has either a url or a path")
    return dict(node.values) | ({"sha256": node.values["sha256"].lower()} if source == "tarball" else {})


def document(path: Path, what: str) -> Node:
    """Read a YAML file that is one mapping. Raises ConfigError with file and line."""
    try:
        node = yaml.compose(plain_file(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e
    except RecursionError as e:
        raise ConfigError(f"{path}: nested too deeply to be read") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: not YAML: it is not text in UTF-8") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {getattr(e, 'problem', e)}") from e
    if node is None:
        raise ConfigError(f"{path}: {what} is empty")
    return Node(path, node, what)


def _check_together(top: Node, board: Board, rootfs: str, kernel: dict[str, Any]) -> None:
    """Raise ConfigError for keys that contradict each other."""
    linux = _ROOTFS[rootfs][0]
    if rootfs not in PROGRAMS[board.qemu.program]:
        raise top.wrong("rootfs", f"an impossible board: {board.qemu.program} does not run {rootfs}")
    cpu = board.cpu.partition(",")[0]
    if rootfs == "arm64" and cpu in _CPUS_32:
        raise top.wrong("rootfs", f"an impossible board: a {cpu} is a 32-bit CPU, and rootfs is arm64")
    if rootfs == "armhf" and "A64" in top.names("guests"):
        raise top.wrong("guests", "guests: a 32-bit host has no A64 guests")
    for fragment in kernel.get("fragments", []):
        if fragment.endswith("-virt") and fragment != f"{linux}-virt":
            raise top.wrong("kernel", f"fragments: {fragment!r} is for another architecture; rootfs is {rootfs}")
    foreign = {"arm64": "armmp", "armhf": "arm64"}[rootfs]
    if foreign in kernel.get("package", ""):
        raise top.wrong("kernel", f"package: {kernel['package']!r} is for another architecture; rootfs is {rootfs}")
    for word in top.text("cmdline").split() if "cmdline" in top.values else ():
        if re.split("[=.]", word)[0] in _RESERVED:
            raise top.wrong("cmdline", f"cmdline: {word!r} is set by the lab: a host's first process is images/init")
    if "cmdline" in top.values and len(top.text("cmdline")) >= _CMDLINE[linux] - _APPENDED:
        kept = _CMDLINE[linux] - _APPENDED - 1
        raise top.wrong("cmdline", f"cmdline: an {linux} kernel keeps {kept} characters before what the lab appends")


def load(path: Path) -> HostConfig:
    """Read one host file. Raises ConfigError with file, line and, for an unknown word, the nearest known one."""
    top = document(path, "the host file")
    top.check_keys(TOP, ("board", "kernel", "rootfs"))
    can = top.names("can")
    for capability in can:
        if capability not in CAPABILITIES:
            raise top.wrong("can", f"can: {capability!r} is not known; {hint(capability, CAPABILITIES, 'one of')}")
    if "kvm" in can and not top.names("guests"):
        raise top.wrong("guests", "guests: a host that can kvm names its guests' instruction sets")
    for isa in top.names("guests"):
        if isa not in ISAS:
            raise top.wrong("guests", f"guests: {isa!r} is not known; one of: {', '.join(ISAS)}")
    timeouts = TIMEOUTS
    if "timeouts" in top.values:
        own = top.child("timeouts", "timeouts")
        own.check_keys(TIMEOUTS, ())
        timeouts = TIMEOUTS | {key: float(own.integer(key, 1, 3600, "seconds")) for key in own.values}
    board, rootfs = _board(top.child("board", "board"), can), top.one_of("rootfs", _ROOTFS)
    kernel = _kernel(top.child("kernel", "kernel"))
    _check_together(top, board, rootfs, kernel)
    return HostConfig(
        name=path.stem,
        path=path,
        board=board,
        kernel=kernel,
        rootfs=rootfs,
        cmdline=top.text("cmdline") if "cmdline" in top.values else "",
        can=frozenset(can),
        guests=tuple(top.names("guests")),
        timeouts=timeouts,
        emulator=top.text("emulator") if "emulator" in top.values else "",
        boot_afresh=top.text("boot_afresh") if "boot_afresh" in top.values else "",
    )


def host_names() -> list[str]:
    """The names of the hosts in ``configs/hosts``."""
    return sorted(path.stem for path in (CONFIGS / "hosts").glob("*.yaml"))


def find(name: str) -> HostConfig:
    """The host of this name, or of this path when it ends in .yaml or .yml. Raises ConfigError."""
    if name.lower().endswith((".yaml", ".yml")):
        return load(written_path(name))
    if "/" in name:
        raise ConfigError(f"{name} is not a host file: those end in .yaml")
    if name not in host_names():
        raise ConfigError(f"no host is called {name!r}; {hint(name, host_names(), 'there are')}")
    return load(CONFIGS / "hosts" / f"{name}.yaml")
