"""The cache: folders named by a key of all their inputs, made once, whoever asks first.

An entry is made in a folder beside its final place and renamed when it is whole, under a lock per key:
two processes never make the same entry twice, and an interrupted one leaves nothing that is taken for
a result. ``work`` survives an interruption, so that a download or a build goes on where it stopped; what nobody came
back to for a month goes, and the oldest when there are more than four. The sizes of an entry's files are kept with it:
one that was damaged since is made anew.
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

from filelock import FileLock, Timeout

from arm_kvm.support.limits import refusals_told
from arm_kvm.support.paths import cache_root
from arm_kvm.support.progress import note


def key_of(*inputs: object) -> str:
    """A short name for these inputs: bytes are hashed as they are, anything else as sorted JSON."""
    digest = hashlib.sha256()
    for item in inputs:
        data = item if isinstance(item, bytes) else json.dumps(item, sort_keys=True, default=str).encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


_META, _SIZES = "meta.json", "sizes.json"
#: For how long, in seconds, and how many scratch folders of interrupted makers are kept: a kernel's has 1 to 2 GB.
_KEPT, _MOST = 30 * 24 * 3600, 4


@dataclass(frozen=True)
class CacheEntry:
    """A folder of the cache: a finished entry, or what an interruption left of one (:func:`leftovers`)."""

    folder: Path

    @property
    def meta(self) -> dict:
        return json.loads((self.folder / _META).read_text())

    def damage(self) -> str:
        """The file of a finished entry that is not as it was made; "" where all are."""
        for name in (_META, _SIZES):
            try:
                sizes = json.loads((self.folder / name).read_text())
            except FileNotFoundError:  # of an entry that is checked otherwise
                sizes = {}
            except (OSError, ValueError):
                return name
        return next((name for name, size in sizes.items() if _size_of(self.folder / name) != size), "")


def _entry_folder(kind: str, key: str) -> Path:
    return cache_root() / kind / key


def _size_of(path: Path) -> int:
    """-1 for what is not there."""
    return path.stat().st_size if path.is_file() else -1


def lookup(kind: str, key: str) -> CacheEntry | None:
    """The entry, if it is there and whole; a damaged one is taken away."""
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
            if "." not in meta.parent.name:  # else it is being made, or taken away
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
    """What interrupted processes left of entries: scratch folders, which the next attempt goes on with, and halves."""
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
    """Bytes of disk that an entry takes, holes not counted."""
    used = 0
    for path in entry.folder.rglob("*"):
        with suppress(FileNotFoundError):
            used += path.lstat().st_blocks * 512
    return used


def kinds() -> list[str]:
    """What the cache has entries of, or leftovers."""
    return sorted(kind.name for kind in cache_root().glob("*/") if entries(kind.name) or leftovers(kind.name))


def remove(entry: CacheEntry) -> None:
    """Take an entry away. A file of it that somebody has open stays as long as that."""
    gone = entry.folder.with_suffix(f".gone-{os.getpid()}")
    with suppress(FileNotFoundError):  # somebody was faster
        os.rename(entry.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def keep_within(kind: str, budget: int) -> None:
    """Remove entries of a kind, those used longest ago first, until the rest fits ``budget`` bytes.

    Using an entry means touching its meta.json. The newest stays whatever it takes.
    """
    used = 0
    for number, entry in enumerate(entries(kind)):
        used += size(entry)
        if number and used > budget:
            remove(entry)


Maker = Callable[[Path, Path], dict]


def obtain(kind: str, key: str, make: Maker, *, sized: bool = True) -> CacheEntry:
    """The entry of this key, made if it is not there. ``sized``: whether its files are known by their sizes later.

    ``make(out, work)`` fills the folder ``out`` and returns the entry's meta data; ``work`` is its
    scratch folder, kept when it is interrupted and removed when it succeeds. Raises DiskFull, and
    whatever ``make`` raises.
    """
    if found := lookup(kind, key):
        return found
    final = _entry_folder(kind, key)
    with refusals_told(cache_root()):
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
