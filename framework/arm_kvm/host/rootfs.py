"""The host's root file system: a cached initramfs of Debian packages, and a small overlay.

The base (packages and keys) takes seconds to make and is cached. The overlay (init, the agent, the kernel's modules)
is packed for every boot, in milliseconds, so that the agent is always the current one.
"""

from __future__ import annotations

import fnmatch
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import paramiko
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from arm_kvm import agent
from arm_kvm.host.cpio import CpioWriter
from arm_kvm.support import cache
from arm_kvm.support.apt import source_lines
from arm_kvm.support.errors import RootfsError
from arm_kvm.support.paths import IMAGES
from arm_kvm.support.programs import run
from arm_kvm.support.progress import note, task

AGENT_HOME = "usr/lib/arm-kvm"
_FORMAT = 3  #: raise it when the packing below changes


class Spec(TypedDict):
    """The contents of ``images/rootfs.yaml``."""

    suite: str
    packages: list[str]
    leave_out: list[str]  #: shell patterns


@dataclass(frozen=True)
class Rootfs:
    """A root file system without its overlay: the base archive and the keys made for it."""

    key: str
    base: Path
    client_key: Path
    host_key: str  #: the host's public key, base64 of its wire form

    @property
    def bytecode_key(self) -> str:
        """Key of the root file system and the agent's sources."""
        return cache.key_of(self.key, *(path.read_bytes() for path in _agent_sources()))

    @property
    def overlay_key(self) -> str:
        """Key of everything in a host's root file system except the kernel's modules."""
        return cache.key_of(self.bytecode_key, (IMAGES / "init").read_bytes())

    @property
    def bytecode(self) -> Path | None:
        """The agent's compiled modules as an archive, if a host has compiled them before."""
        entry = cache.lookup("bytecode", self.bytecode_key)
        return entry.folder / "bytecode.cpio" if entry else None

    def keep_bytecode(self, files: list[tuple[str, int]], blob: bytes) -> None:
        """Cache what :meth:`arm_kvm.agent.operations.Operations.bytecode` has compiled, for later boots.

        ``files`` are (path, size) of the parts of ``blob``. Compiling takes one to two seconds on an emulated CPU, and
        this machine's Python may be of another version.
        """

        def make(out: Path, work: Path) -> cache.Meta:
            with (out / "bytecode.cpio").open("wb") as f:
                archive, start = CpioWriter(f), 0
                for name, size in files:
                    archive.file(name.lstrip("/"), blob[start : start + size])
                    start += size
                archive.close()
            return {"rootfs": self.key, "files": len(files)}

        cache.obtain("bytecode", self.bytecode_key, make)

    def initramfs(self, out: Path, modules: Sequence[tuple[str, bytes]] = ()) -> Path:
        """Write base and overlay to ``out``. ``modules`` are (file name, contents) in load order."""
        with out.open("wb") as f:
            f.write(self.base.read_bytes())
            if self.bytecode:
                f.write(self.bytecode.read_bytes())
            overlay = CpioWriter(f)
            overlay.file("init", (IMAGES / "init").read_bytes(), 0o755)
            for path in _agent_sources():
                overlay.file(f"{AGENT_HOME}/agent/{path.name}", path.read_bytes())
            for name, data in modules:
                overlay.file(f"lib/modules/{name}", data)
            if modules:
                load = "".join(f"/lib/modules/{name}\n" for name, _ in modules)
                overlay.file("lib/modules/load", load.encode())
            overlay.close()
        return out


def _agent_sources() -> list[Path]:
    return sorted(Path(agent.__file__).parent.glob("*.py"))


def obtain(architecture: str) -> Rootfs:
    """Return the root file system for a Debian architecture (armhf, arm64), made if it is not cached.

    Raises RootfsError, SetupError (mmdebstrap is missing), DiskFull.
    """
    text = (IMAGES / "rootfs.yaml").read_bytes()
    key = cache.key_of(_FORMAT, architecture, text)
    entry = cache.obtain("rootfs", key, lambda out, work: _make(yaml.safe_load(text), architecture, out, work))
    folder = entry.folder
    return Rootfs(key, folder / "base.cpio", folder / "client_key", entry.meta["host_key"])


def _make(spec: Spec, architecture: str, out: Path, work: Path) -> cache.Meta:
    tar = work / "packages.tar"
    with task(f"root file system ({architecture})"):
        _extract(spec, architecture, tar)
        host_key = Ed25519PrivateKey.generate()
        client_key = paramiko.ECDSAKey.generate()
        client_key.write_private_key_file(str(out / "client_key"))
        with (out / "base.cpio").open("wb") as f:
            _pack(spec, tar, CpioWriter(f), host_key, client_key)
    return {"architecture": architecture, "suite": spec["suite"], "host_key": _public(host_key)}


def _extract(spec: Spec, architecture: str, tar: Path) -> None:
    """Extract the packages into a tar, without root and without running foreign code. Raises RootfsError."""
    stderr = ""
    choices = source_lines(spec["suite"])
    for lines in choices + choices[-1:]:  # the last one twice: the mirror's sync may just have ended
        argv = [
            *("mmdebstrap", "--mode=chrootless", "--variant=extract", "--quiet", "--format=tar"),
            "--skip=check/chrootless",  # newer versions reject root, though no code of the packages is run
            *(f"--architectures={architecture}", f"--include={','.join(spec['packages'])}"),
            *(spec["suite"], str(tar), *lines),
        ]
        done = run(argv)
        if done.returncode == 0:
            if len(lines) < len(choices[0]):
                note("root file system made without updates and security suites: their index cannot be read now")
            return
        stderr = done.stderr.strip()
    raise RootfsError(
        f"mmdebstrap cannot extract the {architecture} packages",
        remedy="see its messages below; if the mirror was being synced, try again in a minute",
        evidence="\n".join(stderr.splitlines()[-15:]),
    )


def _pack(spec: Spec, tar: Path, out: CpioWriter, host_key: Ed25519PrivateKey, client_key: paramiko.PKey) -> None:
    def keep(name: str) -> bool:
        return not any(fnmatch.fnmatch(name, pattern) for pattern in spec["leave_out"])

    out.folder("root", 0o700)
    out.folder("root/.ssh", 0o700)
    with tarfile.open(tar) as archive:
        out.tar(archive, keep)
    out.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\n")
    out.file("etc/group", b"root:x:0:\n")
    out.file("etc/shells", b"/bin/sh\n")
    out.file("etc/dropbear/host_key", _dropbear_key(host_key), 0o600)
    out.file("root/.ssh/authorized_keys", f"{client_key.get_name()} {client_key.get_base64()}\n".encode(), 0o600)
    out.link("bin/sh", "busybox")
    out.close()


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _raw(key: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    encoding, none = serialization.Encoding.Raw, serialization.NoEncryption()
    private = key.private_bytes(encoding, serialization.PrivateFormat.Raw, none)
    return private, key.public_key().public_bytes(encoding, serialization.PublicFormat.Raw)


def _dropbear_key(key: Ed25519PrivateKey) -> bytes:
    """The contents of dropbear's host key file (dropbear src/ed25519.c, buf_put_ed25519_priv_key)."""
    private, public = _raw(key)
    return _string(b"ssh-ed25519") + _string(private + public)


def _public(key: Ed25519PrivateKey) -> str:
    return paramiko.Ed25519Key(data=_string(b"ssh-ed25519") + _string(_raw(key)[1])).get_base64()
