"""Access to Debian's archive for other architectures and suites, through this machine's apt.

Mirrors are taken from apt's own configuration only. Foreign packages are looked up in a private apt state, so that
this machine's package management stays unchanged and root is not needed.
"""

from __future__ import annotations

import difflib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from arm_kvm.support.errors import NoArchive, PackageError, SetupError, Unending
from arm_kvm.support.limits import disk_full, is_full
from arm_kvm.support.programs import run
from arm_kvm.support.progress import note

_TRIES = 3
_PATIENCE = 900  #: seconds; on a full disk apt waits for ever
_NO_ROOM = "enough free space"  #: part of apt's message when a download does not fit on the disk
#: Part of apt's message about a suite that the archive does not have (apt-pkg/acquire-item.cc).
_NO_SUCH_SUITE = "does not have a Release file"


@dataclass(frozen=True)
class Archive:
    """One configured repository: its URI and its suite."""

    uri: str
    suite: str


def archives() -> list[Archive]:
    """The Debian repositories with a main component in this machine's apt configuration. Raises SetupError."""
    if shutil.which("apt-get") is None:
        raise SetupError("apt-get is not installed: Debian's packages cannot be fetched", remedy="use a Debian machine")
    wanted = "$(ORIGIN)|$(COMPONENT)|$(REPO_URI)|$(RELEASE)"
    targets = run(["apt-get", "indextargets", "--format", wanted, "Identifier: Packages"]).stdout
    rows = [line.split("|") for line in targets.splitlines() if line.count("|") == 3]
    found = [Archive(r[2], r[3]) for r in rows if r[1] == "main" and r[0] in ("Debian", "")]
    if not found:
        raise _no_archive({r[0] for r in rows})
    return list(dict.fromkeys(found))


def _no_archive(origins: set[str]) -> SetupError:
    if origins:
        return SetupError(
            f"apt on this machine has no Debian archive configured, only {', '.join(sorted(origins))}",
            remedy="add a source of Debian's main component (`man sources.list`), run `apt-get update`, "
            "and check that debian-archive-keyring is installed",
        )
    return SetupError(
        "apt on this machine has no Debian archive configured, or has never read its index",
        remedy="run `arm-kvm setup`, which runs apt-get update",
    )


def main_archive() -> str:
    """URI of the archive that has whole suites, not only updates or security. Raises SetupError."""
    plain = [a.uri for a in archives() if "-" not in a.suite]
    if not plain:
        raise SetupError("apt on this machine has only partial Debian suites configured")
    return plain[0]


#: Suites that have neither updates nor a security archive.
_ROLLING = ("sid", "unstable", "experimental")
#: Suites beside a release's main one, used if this machine has them configured for its own release.
_COMPANIONS = ("updates", "security")


def source_lines(suite: str) -> list[list[str]]:
    """Return sets of apt source lines for ``suite``: first with updates and security, then without.

    ``suite`` may be a release or a part of one, such as trixie-backports, which needs its release. The archives of
    another release's updates are derived from those that this machine uses for its own. The second set is for a mirror
    in the middle of a sync, which must not stop a build. Raises SetupError.
    """
    main = main_archive()
    release = suite.partition("-")[0]
    base = [f"deb {main} {name} main" for name in dict.fromkeys([release, suite])]
    parts = [(a.uri, a.suite.partition("-")[2]) for a in archives()]
    beside = [(uri, part) for uri, part in parts if part in _COMPANIONS and release not in _ROLLING]
    extra = [f"deb {uri} {release}-{part} main" for uri, part in beside]
    extra = [line for line in extra if line not in base]
    if not beside and release not in _ROLLING:
        note(f"apt on this machine has no updates or security archive configured: {suite} is used without them")
    return [[*base, *extra], base] if extra else [base]


class PrivateApt:
    """apt for another architecture and suite, with all its state in one folder. Its methods raise PackageError."""

    def __init__(self, folder: Path, architecture: str, suite: str) -> None:
        self._folder = folder
        self._suite = suite
        self._sets = source_lines(suite)
        for sub in ("state/lists/partial", "cache/archives/partial", "etc"):
            (folder / sub).mkdir(parents=True, exist_ok=True)
        (folder / "state/status").touch()
        self._options = [
            *("-o", f"Dir::State={folder / 'state'}", "-o", f"Dir::State::status={folder / 'state/status'}"),
            *("-o", f"Dir::Cache={folder / 'cache'}", "-o", f"Dir::Etc::sourcelist={folder / 'etc/sources.list'}"),
            *("-o", "Dir::Etc::sourceparts=-", "-o", "APT::Sandbox::User=root"),
            *("-o", f"APT::Architecture={architecture}", "-o", f"APT::Architectures={architecture}"),
        ]
        if "-" in suite:  # apt prefers the release to its backports
            self._options += ["-o", f"APT::Default-Release={suite}"]
        self._update()

    def _run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run an apt program. Raises DiskFull if apt reports a full disk or waits for space, NoArchive if it hangs."""
        try:
            done = run([arguments[0], *self._options, *arguments[1:]], cwd=cwd, patience=_PATIENCE)
        except Unending as e:
            if is_full(self._folder):
                raise disk_full(self._folder, e.message) from e
            raise NoArchive(e.message, remedy="check whether the archive is reachable") from e
        if done.returncode and _NO_ROOM in done.stderr:
            raise disk_full(self._folder)
        return done

    def _update(self) -> None:
        """Fetch the index of the fullest set of sources that is available."""
        failure = ""
        while self._sets:
            for _ in range(_TRIES):
                failure = self._read(self._sets[0])
                if not failure:
                    return
            if len(self._sets) > 1:
                note(f"{self._suite}: its updates or security archive cannot be read; going on without them")
            self._sets.pop(0)
        if _NO_SUCH_SUITE in failure:
            raise PackageError(
                f"Debian has no suite {self._suite!r}",
                remedy="name one that this machine's archive has, such as bookworm, trixie, trixie-backports, sid",
                evidence=failure,
            )
        raise NoArchive(
            f"apt cannot read the index of suite {self._suite!r}",
            remedy="try again when the archive is reachable",
            evidence=failure,
        )

    def _read(self, lines: list[str]) -> str:
        """Fetch the index of these sources; returns apt's error message, or ""."""
        keyring = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
        option = f"[signed-by={keyring}] " if keyring.exists() else ""
        sources = "\n".join(line.replace("deb ", f"deb {option}", 1) for line in lines)
        (self._folder / "etc/sources.list").write_text(sources + "\n")
        done = self._run("apt-get", "update", "-q", "--error-on=any")
        return (done.stderr.strip() or "apt-get update failed") if done.returncode else ""

    def fetch(self, choose: Callable[[PrivateApt], list[str]], where: Path) -> list[Path]:
        """Download the packages that ``choose`` names into the folder ``where``, and return the .deb files.

        The index of a release that is no longer supported lists updates that the archive has removed; ``choose`` is
        then called again without updates.
        """
        while True:
            try:
                return self._download(choose(self), where)
            except NoArchive:
                if len(self._sets) < 2:
                    raise
            note(f"{self._suite}: the archive lacks updates that its index lists; going on without them")
            self._sets.pop(0)
            self._update()

    def depends(self, package: str) -> list[str]:
        """Names of the direct dependencies of ``package``, first alternatives only."""
        done = self._run("apt-cache", "show", "--no-all-versions", package)
        if done.returncode:
            raise PackageError(
                f"suite {self._suite!r} has no package {package!r}",
                remedy=self._nearest(package),
                evidence=done.stderr.strip(),
            )
        fields = [
            line.split(":", 1)[1] for line in done.stdout.splitlines() if line.startswith(("Depends:", "Pre-Depends:"))
        ]
        return [item.split("|")[0].split("(")[0].split(":")[0].strip() for f in fields for item in f.split(",")]

    def _nearest(self, package: str) -> str:
        """The remedy for an unknown package: the nearest name of those with the same first word."""
        alike = self._run("apt-cache", "pkgnames", package.partition("-")[0]).stdout.split()
        near = difflib.get_close_matches(package, alike, n=1, cutoff=0.8)
        return f"did you mean {near[0]}?" if near else "correct package and suite"

    def closure(self, package: str) -> list[str]:
        """Names of all packages that apt would install with ``package`` on an empty machine."""
        done = self._run("apt-get", "install", "--simulate", "--no-install-recommends", package)
        if done.returncode:
            raise PackageError(
                f"suite {self._suite!r} has no installable package {package!r}",
                remedy="correct the suite",
                evidence=done.stderr.strip(),
            )
        return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("Inst ")]

    def _download(self, packages: list[str], where: Path) -> list[Path]:
        """Download the packages' .deb files into ``where``."""
        done = self._run("apt-get", "download", *packages, cwd=where)
        if done.returncode:
            raise NoArchive(
                f"apt cannot download {' '.join(packages)}",
                remedy="try again when the archive is reachable",
                evidence=done.stderr.strip(),
            )
        return sorted(where.glob("*.deb"))
