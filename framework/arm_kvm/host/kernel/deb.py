"""Debian's kernels: the image and the few modules that a host needs, from the packages of any suite."""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from arm_kvm.host.kernel.kernel import Kernel, check_image
from arm_kvm.support import cache
from arm_kvm.support.apt import PrivateApt
from arm_kvm.support.errors import ArchiveSilent, KernelError, NoArchive, PackageError, SetupError
from arm_kvm.support.programs import unpack
from arm_kvm.support.progress import task

_FORMAT = 2  #: raise it when what is taken from a package changes
_ARCH = {"arm": "armhf", "arm64": "arm64"}
_FOLLOWED = re.compile(r"^linux-(image|binary|modules|base)-")
_MODULE = re.compile(r"^(?P<name>.+)\.ko(?P<packing>\.xz|\.gz|\.zst)?$")


def from_package(package: str, suite: str, arch: str, modules: list[str]) -> Kernel:
    """Fetch the kernel of a Debian package. Raises KernelError, SetupError, DiskFull."""

    def make(out: Path, work: Path) -> cache.Meta:
        with task(f"Debian kernel {package} ({suite}, {_ARCH[arch]})"):
            root = _unpack(package, suite, arch, work)
            image = _find_image(root)
            (out / "image").write_bytes(_unwrapped(image))
            check_image(out / "image", arch)
            order = _copy_modules(root, modules, out)
            version = next((p.name for p in _module_root(root).iterdir() if p.is_dir()), "unknown")
        return {"label": f"{package}, {suite}", "version": version, "modules": order, "deb": True}

    entry = cache.obtain("kernels", cache.key_of("deb", _FORMAT, package, suite, arch, modules), make)
    meta = entry.meta
    loaded = [(name, (entry.folder / "modules" / name).read_bytes()) for name in meta["modules"]]
    return Kernel(f"Linux {meta['version']} (Debian {meta['label']})", entry.folder / "image", loaded)


def _unpack(package: str, suite: str, arch: str, work: Path) -> Path:
    """Download and unpack the package, and the kernel packages that it depends on; returns the folder."""
    if shutil.which("dpkg-deb") is None:
        raise SetupError("dpkg-deb is not installed", remedy="use a Debian machine, or another kernel source")
    debs, root = work / "debs", work / "root"
    for folder in (debs, root):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        apt = PrivateApt(work / "apt", _ARCH[arch], suite)
        found = apt.fetch(lambda apt: _with_kernel_packages(apt, package), debs)
    except PackageError as e:
        kind = ArchiveSilent if isinstance(e, NoArchive) else KernelError
        raise kind(e.message, remedy=e.remedy, evidence=e.evidence) from e
    for deb in found:
        _tool(["dpkg-deb", "-x", str(deb), str(root)])
    return root


def _with_kernel_packages(apt: PrivateApt, package: str) -> list[str]:
    """The package, and the kernel packages that it depends on."""
    wanted: list[str] = []
    queue = [package]
    while queue:
        name = queue.pop()
        if name not in wanted:
            wanted.append(name)
            queue += [dep for dep in apt.depends(name) if _FOLLOWED.match(dep)]
    return wanted


def _module_root(root: Path) -> Path:
    """The suite's lib/modules: in /usr or not. Raises KernelError."""
    for folder in ("usr/lib/modules", "lib/modules"):
        if (root / folder).is_dir():
            return root / folder
    raise KernelError("the kernel package has no modules folder")


def _find_image(root: Path) -> Path:
    found = sorted(root.glob("boot/vmlinuz-*")) + sorted(root.glob("usr/lib/modules/*/vmlinuz"))
    if not found:
        raise KernelError("the kernel package contains no vmlinuz")
    return found[0]


def _unwrapped(image: Path) -> bytes:
    """The image as QEMU can load it, without an EFI zboot wrapper (drivers/firmware/efi/libstub/zboot-header.S)."""
    data = image.read_bytes()
    if data[:2] != b"MZ" or data[4:8] != b"zimg":
        return data
    offset, size = struct.unpack_from("<II", data, 8)
    packing = data[24:32].rstrip(b"\0").decode()
    unpack = {"gzip": gzip.decompress, "xzkern": lzma.decompress, "lzma": lzma.decompress, "zstd": _unzstd}.get(packing)
    if unpack is None:
        raise KernelError(f"{image.name} is compressed with {packing}, which the lab cannot unpack")
    try:
        return unpack(data[offset : offset + size])
    except (lzma.LZMAError, OSError, EOFError) as e:
        raise KernelError(f"{image.name} is not the {packing} image that its header describes: {e}") from e


def _unzstd(data: bytes) -> bytes:
    if shutil.which("zstd") is None:
        raise SetupError("zstd is not installed: this kernel package needs it", remedy="run `arm-kvm setup`")
    return _tool(["zstd", "-dcq"], data)


def _tool(argv: list[str], data: bytes | None = None) -> bytes:
    """Run an unpacker; return its output. Raises KernelError, and what :func:`arm_kvm.support.programs.run` raises."""
    done = unpack(argv, data)
    if done.returncode:
        evidence = done.stderr.decode(errors="replace").strip()
        raise KernelError(f"{argv[0]} cannot unpack the kernel package", evidence=evidence)
    return done.stdout


def _unpacked_module(path: Path) -> bytes:
    data = path.read_bytes()
    unpackers: dict[str, Callable[[bytes], bytes]] = {
        ".xz": lzma.decompress,
        ".gz": gzip.decompress,
        ".zst": _unzstd,
    }
    return unpackers[path.suffix](data) if path.suffix in unpackers else data


def _copy_modules(root: Path, wanted: list[str], out: Path) -> list[str]:
    """Copy the wanted modules and their dependencies; return their file names in load order.

    A module whose name ends in "?" may be missing. Raises KernelError.
    """
    home = _module_root(root)
    files = {m["name"].replace("-", "_"): p for p in home.rglob("*.ko*") if (m := _MODULE.match(p.name))}
    builtin_list = next(iter(home.glob("*/modules.builtin")), None)
    builtin = builtin_list.read_text() if builtin_list else ""
    builtins = {Path(line).stem.replace("-", "_") for line in builtin.splitlines()}
    order: list[str] = []
    (out / "modules").mkdir()

    def load(name: str) -> None:
        name = name.replace("-", "_")
        if name in builtins or f"{name}.ko" in order:
            return
        if name not in files:
            raise KernelError(f"the kernel package has no module {name!r}", remedy="correct `modules` in the host file")
        data = _unpacked_module(files[name])
        # .modinfo contains "depends=a,b" as a C string, so that depmod is not needed.
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for dependency in filter(None, (depends[1].decode() if depends else "").split(",")):
            load(dependency)
        (out / "modules" / f"{name}.ko").write_bytes(data)
        order.append(f"{name}.ko")

    for name in wanted:
        if not name.endswith("?") or name[:-1] in files:
            load(name.rstrip("?"))
    return order
