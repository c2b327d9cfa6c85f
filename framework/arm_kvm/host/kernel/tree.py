"""Source trees and tarballs as inputs of a build, and the cached kernels that are built from them."""

from __future__ import annotations

import errno
import hashlib
import lzma
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from arm_kvm.host.kernel.build import TOOLCHAINS, Build, fragment_files
from arm_kvm.host.kernel.kernel import Kernel
from arm_kvm.support import cache
from arm_kvm.support.errors import BuildFailed, KernelError, SetupError
from arm_kvm.support.paths import plain_file
from arm_kvm.support.programs import run
from arm_kvm.support.progress import task

#: Python 3.12 warns if no filter is given, and Debian 12's 3.11.2 has none.
_FILTERS = hasattr(tarfile, "tar_filter")
#: Folders of a kernel tree that the lab's builds do not read.
_UNREAD = frozenset({".git", "Documentation", "samples", "LICENSES"})


def check_tree(tree: Path) -> None:
    """Raise KernelError if this is not a kernel source tree."""
    if not (tree / "Kconfig").is_file() or not (tree / "arch").is_dir():
        raise KernelError(
            f"{tree} is not a kernel source tree (it has no Kconfig, or no arch)",
            remedy="give the top folder of one, or an image from arch/*/boot",
        )


def fingerprint(tree: Path, arch: str) -> str:
    """Hash the contents of every file that a build for ``arch`` can read. Raises KernelError, BuildFailed."""
    check_tree(tree)
    if (tree / ".config").exists() or (tree / "include/config").exists():
        raise BuildFailed(
            f"{tree} was built in place; an out-of-tree build needs it clean",
            remedy=f"give a clean one: git -C {tree} worktree add ../clean HEAD (make mrproper removes .config)",
        )
    digest = hashlib.blake2b(digest_size=16)
    foreign = {p.name for p in (tree / "arch").iterdir() if p.is_dir()} - {arch, "arm", "x86"}
    with task(f"read {tree.name}") as step:
        for folder, subs, files in os.walk(tree):
            here = os.path.relpath(folder, tree)
            skip = _UNREAD if here == "." else foreign if here == "arch" else frozenset()
            subs[:] = sorted(set(subs) - skip)
            for name in sorted(files):
                path = os.path.join(folder, name)
                digest.update(f"{here}/{name}\0".encode())
                digest.update(os.readlink(path).encode() if os.path.islink(path) else Path(path).read_bytes())
            step(len(files))
    return digest.hexdigest()


def from_tree(tree: Path, arch: str, fragments: list[str], patches: list[Path]) -> Kernel:
    """Build the kernel of a source tree; patches are applied to a copy of it."""

    def prepare(work: Path) -> Path:
        return _patched(tree, patches, work) if patches else tree

    fragment_files(fragments)  # reports an unknown name before the tree is read
    if patches and shutil.which("patch") is None:
        raise SetupError("patch is not installed", remedy="run `arm-kvm setup`")
    inputs = [fingerprint(tree, arch), *(_read_patch(p) for p in patches)]
    label = f"tree {tree.name}" + (f" + {len(patches)} patches" if patches else "")
    return _built(label, arch, fragments, inputs, prepare, len(patches))


def from_tarball(tarball: Path, sha256: str, arch: str, fragments: list[str]) -> Kernel:
    """Build the kernel of a release tarball."""
    return _built(tarball.name, arch, fragments, [sha256], lambda work: _unpacked(tarball, work))


def cached_tarball(sha256: str, arch: str, fragments: list[str]) -> Kernel | None:
    """The cached kernel that was built from the tarball of this checksum, if any; the tarball is not needed then."""
    entry = cache.lookup("kernels", build_key(arch, fragments, [sha256]))
    return _kernel(entry) if entry else None


def cached_build(arch: str, fragments: list[str], series: str) -> Kernel | None:
    """The newest cached kernel of a series (5.4) that was built for ``arch`` with these fragments and no patches."""
    for entry in cache.entries("kernels"):
        meta = {} if entry.damage() else entry.meta
        same = (meta.get("arch"), meta.get("fragments"), meta.get("patches", 0)) == (arch, fragments, 0)
        if same and f"{meta['version']}.".startswith(f"{series}."):
            return _kernel(entry)
    return None


def build_key(arch: str, fragments: list[str], inputs: Sequence[object]) -> str:
    """The cache key of a build: of architecture, compiler, fragments' contents and sources (``inputs``)."""
    texts = [path.read_bytes() for path in fragment_files(fragments)]
    return cache.key_of("build", arch, TOOLCHAINS[arch].version(), *texts, *inputs)


def _built(
    label: str,
    arch: str,
    fragments: list[str],
    inputs: Sequence[object],
    prepare: Callable[[Path], Path],
    patches: int = 0,
) -> Kernel:
    def make(out: Path, work: Path) -> cache.Meta:
        build = Build(prepare(work), work / "build", arch, fragment_files(fragments))
        shutil.copy(build.run(), out / "image")
        shutil.copy(work / "build/.config", out / "config")
        about = {"label": label, "version": build.version(), "arch": arch}
        return {**about, "fragments": fragments, "patches": patches}

    return _kernel(cache.obtain("kernels", build_key(arch, fragments, inputs), make))


def _kernel(entry: cache.CacheEntry) -> Kernel:
    meta = entry.meta
    return Kernel(f"Linux {meta['version']} ({meta['label']})", entry.folder / "image")


def _read_patch(patch: Path) -> bytes:
    try:
        return plain_file(patch).read_bytes()
    except OSError as e:
        raise KernelError(f"cannot read the patch {patch}: {e.strerror}") from e


def _patched(tree: Path, patches: list[Path], work: Path) -> Path:
    """Copy the tree and apply the patches; an unfinished earlier copy is made anew. Raises BuildFailed, KernelError."""
    copy, done = work / "source", work / "source.done"
    if not done.exists():
        shutil.rmtree(copy, ignore_errors=True)
        with task(f"copy {tree.name}"):
            _copy(tree, copy)
        for patch in patches:
            argv = ["patch", "-p1", "--batch", "--forward", "-d", str(copy), "-i", str(patch.resolve())]
            applied = run(argv)
            if applied.returncode:
                raise BuildFailed(f"the patch {patch} does not apply to {tree}", evidence=applied.stdout)
        done.touch()
    return copy


def _copy(tree: Path, copy: Path) -> None:
    try:
        shutil.copytree(tree, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    except shutil.Error as e:
        reason = str(e.args[0][0][2])
        if os.strerror(errno.ENOSPC) in reason:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from e
        raise KernelError(f"cannot copy {tree}: {reason}") from e


def _unpacked(tarball: Path, work: Path) -> Path:
    """Unpack the tarball and return its one top folder; unfinished earlier work is redone. Raises KernelError."""
    folder, done = work / "source", work / "source.done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with task(f"unpack {tarball.name}"), tarfile.open(tarball) as archive:
                if _FILTERS:
                    archive.extractall(folder, filter="tar")
                else:
                    archive.extractall(folder)
        except (tarfile.TarError, lzma.LZMAError, EOFError) as e:
            raise KernelError(f"{tarball} is not a tar archive: {e}") from e
        done.touch()
    tops = [p for p in folder.iterdir() if p.is_dir()]
    if len(tops) != 1:
        raise KernelError(f"{tarball.name} does not contain a single folder with a kernel in it")
    return tops[0]
