"""Download a release tarball: resumed where it stopped, checked against its sha256, and cached under it."""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from arm_kvm.support import cache, limits
from arm_kvm.support.errors import DownloadFailed, KernelError, Offline, WrongChecksum
from arm_kvm.support.paths import offline, plain_file
from arm_kvm.support.progress import task

_CHUNK = 1 << 18
_TIMEOUT = 30.0


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _sha256(path: Path) -> str:
    with plain_file(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fetch(url: str, partial: Path) -> None:
    """Append to ``partial`` the rest of ``url``. Raises OSError, HTTPError, HTTPException, ValueError."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    loopback = _is_loopback(urlsplit(url).hostname)
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))
    with opener.open(request, timeout=_TIMEOUT) as answer:
        resumed = answer.status == 206
        length = int(answer.headers.get("Content-Length", 0))
        done = have if resumed else 0
        with (
            partial.open("ab" if resumed else "wb") as out,
            task(f"download {Path(urlsplit(url).path).name}", done + length, "bytes") as step,
        ):
            step(done)
            while chunk := answer.read(_CHUNK):
                out.write(chunk)
                step(len(chunk))
                done += len(chunk)
    if length and done < length + (have if resumed else 0):
        raise OSError(f"the connection ended after {done} bytes")


def tarball(url: str, sha256: str) -> Path:
    """Return the file at ``url``, from the cache if it is there.

    Raises Offline, DownloadFailed, WrongChecksum, DiskFull.
    """
    name = Path(urlsplit(url).path).name
    if (entry := cache.lookup("downloads", sha256)) is not None:
        return _file_of(entry)
    if offline() and not _is_loopback(urlsplit(url).hostname):
        raise Offline(
            f"{name} is not cached and ARM_KVM_OFFLINE forbids the download",
            remedy="give a kernel with --kernel PATH, or unset ARM_KVM_OFFLINE",
        )

    def make(out: Path, work: Path) -> cache.Meta:
        partial = work / name
        try:
            _fetch(url, partial)
        except urllib.error.HTTPError as e:
            partial.unlink(missing_ok=True)  # the server may have rejected the range of a partial file
            raise DownloadFailed(
                f"cannot download {url}: the server answers {e.code} {e.reason}",
                remedy="correct the url in the host file",
            ) from e
        except (http.client.HTTPException, OSError, ValueError) as e:
            reason = getattr(e, "reason", e)
            if limits.is_limit(reason):
                raise reason from e
            raise DownloadFailed(
                f"cannot download {url}: {reason}",
                remedy="try again when the network is back (it resumes where it stopped), or give --kernel PATH",
            ) from e
        verify(partial, sha256, forget=True)
        partial.rename(out / name)
        return {"url": url, "name": name}

    return _file_of(cache.obtain("downloads", sha256, make))


def _file_of(entry: cache.CacheEntry) -> Path:
    return entry.folder / str(entry.meta["name"])


def verify(path: Path, sha256: str, *, forget: bool = False) -> None:
    """Raise WrongChecksum if the checksum differs (``forget`` removes the file), KernelError if it is unreadable."""
    try:
        found = _sha256(path)
    except OSError as e:
        raise KernelError(f"cannot read {path}: {e.strerror}") from e
    if found != sha256:
        if forget:
            path.unlink()
        raise WrongChecksum(
            f"{path.name} has sha256 {found}, the host file says {sha256}",
            remedy="correct the sha256 in the host file if the new file is the one you mean",
        )
