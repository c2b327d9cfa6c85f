"""The cache: folders named by a key of all their inputs, each made once by the first process that needs it.

An entry is made in a folder next to its final place and renamed when it is complete, under a lock per key, so that two
processes never make the same entry, and an interrupted one leaves nothing that could be taken for a result. The scratch
folder ``work`` survives an interruption, so that a download or a build resumes where it stopped; the four newest
scratch folders of each kind are kept for a month. The sizes of an entry's files are stored with it, and a damaged entry
is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from arm_kvm.support.limits import lab_errors
from arm_kvm.support.paths import cache_root
from arm_kvm.support.progress import note


def key_of(*inputs: object) -> str:
    """Hash these inputs into a short name: bytes as they are, anything else as sorted JSON."""
    digest = hashlib.sha256()
    for item in inputs:
        data = item if isinstance(item, bytes) else json.dumps(item, sort_keys=True, default=str).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


_META, _SIZES = "meta.json", "sizes.json"
#: How long, in seconds, and how many scratch folders of interrupted makers are kept: a kernel's has 1 to 2 GB.
_KEPT, _MOST = 30 * 24 * 3600, 4

#: What the maker of an entry records about it, in JSON; its keys depend on the kind of entry.
Meta = dict[str, Any]


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache: a finished entry, or what an interruption left of one (:func:`leftovers`)."""

    folder: Path

    @property
    def meta(self) -> Meta:
        """What its maker recorded about the entry."""
        found: Meta = json.loads((self.folder / _META).read_text())
        return found

    def damage(self) -> str:
        """The first file of a finished entry that differs from when it was made; "" if none does."""
        for name in (_META, _SIZES):
            try:
                sizes = json.loads((self.folder / name).read_text())
            except FileNotFoundError:  # an entry that has checksums instead
                sizes = {}
            except (OSError, ValueError):
                return name
        return next((name for name, size in sizes.items() if _size_of(self.folder / name) != size), "")


def _entry_folder(kind: str, key: str) -> Path:
    return cache_root() / kind / key


def _size_of(path: Path) -> int:
    """Size in bytes; -1 for a file that does not exist."""
    return path.stat().st_size if path.is_file() else -1


def lookup(kind: str, key: str) -> CacheEntry | None:
    """The entry, if it exists and is undamaged. A damaged one is removed."""
    entry = CacheEntry(_entry_folder(kind, key))
    if not (entry.folder / _META).is_file():
        return None
    if damaged := entry.damage():
        note(f"{entry.folder} of the cache is damaged ({damaged}); it is made anew")
        remove(entry)
        return None
    return entry


def entries(kind: str) -> list[CacheEntry]:
    """All finished entries of a kind, the newest first."""
    found = []
    for meta in (cache_root() / kind).glob("*/meta.json"):
        with suppress(FileNotFoundError):  # just removed
            if "." not in meta.parent.name:  # else it is being made, or removed
                found.append((meta.stat().st_mtime, meta.parent))
    return [CacheEntry(folder) for _, folder in sorted(found, reverse=True)]


def _forget_old_leftovers(kind: str) -> None:
    ages = []
    for entry in leftovers(kind):
        with suppress(FileNotFoundError):  # just removed
            ages.append((time.time() - entry.folder.stat().st_mtime, entry))
    for number, (age, entry) in enumerate(sorted(ages, key=lambda pair: pair[0])):
        if age > _KEPT or number >= _MOST:
            remove(entry)


def leftovers(kind: str) -> list[CacheEntry]:
    """What interrupted processes left: scratch folders, from which the next attempt resumes, and partial entries."""
    folders = (cache_root() / kind).glob("*.*/")
    return [CacheEntry(folder) for folder in folders if not _locked(folder.with_suffix(".lock"))]


def _locked(path: Path) -> bool:
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def size(entry: CacheEntry) -> int:
    """Bytes of disk that an entry uses, holes not counted."""
    used = 0
    for path in entry.folder.rglob("*"):
        with suppress(FileNotFoundError):
            used += path.lstat().st_blocks * 512
    return used


def kinds() -> list[str]:
    """The kinds that the cache has entries or leftovers of."""
    return sorted(kind.name for kind in cache_root().glob("*/") if entries(kind.name) or leftovers(kind.name))


def remove(entry: CacheEntry) -> None:
    """Remove an entry. Processes that have its files open can still read them."""
    gone = entry.folder.with_suffix(f".gone-{os.getpid()}")
    with suppress(FileNotFoundError):  # another process was faster
        os.rename(entry.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def keep_within(kind: str, budget: int) -> None:
    """Remove the least recently used entries of a kind until the rest fits in ``budget`` bytes.

    Using an entry means touching its meta.json. The newest entry is kept whatever its size.
    """
    used = 0
    for number, entry in enumerate(entries(kind)):
        used += size(entry)
        if number and used > budget:
            remove(entry)


Maker = Callable[[Path, Path], Meta]


def obtain(kind: str, key: str, make: Maker, *, sized: bool = True) -> CacheEntry:
    """Return the entry of this key; make it if it does not exist.

    ``make(out, work)`` fills the folder ``out`` and returns the entry's metadata; ``work`` is its scratch folder, kept
    when it is interrupted and removed when it succeeds. With ``sized`` the sizes of the files are stored, to detect
    damage. Raises DiskFull, CacheUnusable, and whatever ``make`` raises.
    """
    if found := lookup(kind, key):
        return found
    final = _entry_folder(kind, key)
    with lab_errors(cache_root()):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _lock(final):
            _forget_old_leftovers(kind)
            return lookup(kind, key) or _make(final, make, sized)


@contextmanager
def _lock(final: Path) -> Iterator[None]:
    lock = FileLock(final.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        note(f"another process is making {final.parent.name}/{final.name}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(final: Path, make: Maker, sized: bool) -> CacheEntry:
    work, out = final.with_suffix(".work"), final.with_suffix(".new")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    work.mkdir(exist_ok=True)
    try:
        meta = make(out, work)
        if sized:
            sizes = {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*") if path.is_file()}
            (out / _SIZES).write_text(json.dumps(sizes))
        (out / _META).write_text(json.dumps(meta, indent=1, default=str))
        os.rename(out, final)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)
    return CacheEntry(final)
