"""Obtain a bootable kernel from a host file's ``kernel`` keys, or from ``--kernel``."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from arm_kvm.host.config import HostConfig
from arm_kvm.host.kernel import deb, download, tree
from arm_kvm.host.kernel.kernel import Kernel, check_image
from arm_kvm.support.errors import DownloadFailed, KernelError, Offline, SetupError
from arm_kvm.support.limits import is_limit
from arm_kvm.support.paths import is_there, written_path


def obtain(config: HostConfig, override: str | None = None) -> Kernel:
    """Return the host's kernel: ``override`` (see :func:`from_argument`), or the one that the host file names.

    Raises KernelError and its subclasses, SetupError, DiskFull, ConfigError.
    """
    try:
        return from_argument(config, override) if override is not None else _SOURCES[config.kernel["source"]](config)
    except OSError as e:
        if e.filename is None or is_limit(e):
            raise
        raise SetupError(f"{e.filename}: {e.strerror}", remedy="correct its owner and permissions") from e


def from_argument(config: HostConfig, what: str) -> Kernel:
    """The kernel of ``--kernel``: an image, a tree (built with the host's fragments) or ``deb:PACKAGE@SUITE``."""
    if what.startswith("deb:"):
        package, suite = _package(what)
        return deb.from_package(package, suite, config.linux_arch, config.kernel.get("modules", []))
    path = _given(what)
    if path.is_dir():
        return tree.from_tree(path, config.linux_arch, fragments_of(config), [])
    return Kernel(str(path), check_image(path, config.linux_arch))


def check(config: HostConfig, what: str) -> None:
    """Raise KernelError if it is clear, without fetching or building, that :func:`from_argument` will fail."""
    if what.startswith("deb:"):
        _package(what)
    elif (path := _given(what)).is_dir():
        tree.check_tree(path)
    else:
        check_image(path, config.linux_arch)


def _package(what: str) -> tuple[str, str]:
    """Package and suite of ``deb:PACKAGE@SUITE``."""
    match = re.fullmatch(r"deb:([a-z0-9][a-z0-9+.-]*)@([a-z0-9][a-z0-9.-]*)", what)
    if not match:
        raise KernelError(
            f"--kernel {what}: a Debian kernel is written deb:PACKAGE@SUITE",
            remedy="write deb:linux-image-arm64@trixie, for example",
        )
    return match[1], match[2]


def _given(what: str) -> Path:
    """The existing path that a user gave. Raises KernelError."""
    path = written_path(what, "--kernel ")
    if not what or not is_there(path):
        remedy = "give an image (zImage or Image), a kernel source tree, or deb:PACKAGE@SUITE"
        raise KernelError(f"--kernel {what!r}: there is no such file or folder", remedy=remedy)
    return path


def build_for(config: HostConfig, source: Path, patches: list[Path], more: list[str]) -> Kernel:
    """Build a source tree for a host into the cache, with its own fragments and ``more``."""
    return tree.from_tree(source, config.linux_arch, [*fragments_of(config), *more], patches)


def tree_of(config: HostConfig, override: str | None = None) -> Path | None:
    """The source tree that the host's kernel is built from; None if it is not built from a tree."""
    if override is not None:
        return path if not override.startswith("deb:") and (path := _given(override)).is_dir() else None
    return _path(config, config.kernel["path"]) if config.kernel["source"] == "tree" else None


def with_patch(config: HostConfig, override: str | None, patch: Path) -> Kernel:
    """Build the tree of :func:`tree_of`, which must not be None, with one more patch."""
    patches = [] if override is not None else _patches(config)
    source = tree_of(config, override)
    if source is None:
        raise KernelError(
            f"{config.name}: its kernel is not built from a source tree, so that no patch can be applied",
            remedy="give a tree with --kernel",
        )
    return tree.from_tree(source, config.linux_arch, fragments_of(config), [*patches, patch])


def fragments_of(config: HostConfig) -> list[str]:
    """The configuration fragments that a kernel for this host is built with."""
    fragments: list[str] = config.kernel.get("fragments", [f"{config.linux_arch}-virt", "lab"])
    return fragments


def _path(config: HostConfig, name: str) -> Path:
    """Resolve a path in a host file, which is relative to that file."""
    return config.path.parent / written_path(name, f"{config.path}: ")


def _file(config: HostConfig) -> Kernel:
    image = check_image(_path(config, config.kernel["image"]), config.linux_arch)
    return Kernel(image.name, image)


def _deb(config: HostConfig) -> Kernel:
    keys = config.kernel
    return deb.from_package(keys["package"], keys["suite"], config.linux_arch, keys.get("modules", []))


def _tree(config: HostConfig) -> Kernel:
    source = _path(config, config.kernel["path"])
    return tree.from_tree(source, config.linux_arch, fragments_of(config), _patches(config))


def _patches(config: HostConfig) -> list[Path]:
    return [_path(config, p) for p in config.kernel.get("patches", [])]


def _tarball(config: HostConfig) -> Kernel:
    keys, arch = config.kernel, config.linux_arch
    if "path" in keys:
        path = _path(config, keys["path"])
        download.verify(path, keys["sha256"])
        return tree.from_tarball(path, keys["sha256"], arch, fragments_of(config))
    with suppress(SetupError):  # without a compiler nothing was built here either
        if (built := tree.cached_tarball(keys["sha256"], arch, fragments_of(config))) is not None:
            return built
    try:
        path = download.tarball(keys["url"], keys["sha256"])
    except (Offline, DownloadFailed) as e:
        # Fall back on a cached kernel of the same series; its name tells the user.
        series = re.search(r"\d+\.\d+", Path(keys["url"]).name)
        cached = tree.cached_build(arch, fragments_of(config), series[0]) if series else None
        if cached is None:
            raise
        why = "offline" if isinstance(e, Offline) else "the download failed"
        return replace(cached, name=f"{cached.name}, from the cache in place of {Path(keys['url']).name}: {why}")
    return tree.from_tarball(path, keys["sha256"], arch, fragments_of(config))


_SOURCES = {"file": _file, "deb": _deb, "tarball": _tarball, "tree": _tree}
