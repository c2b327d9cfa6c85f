"""The system packages that the lab needs; those that are missing are installed with apt."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from arm_kvm.support.errors import SetupError
from arm_kvm.support.limits import disk_full, is_full
from arm_kvm.support.progress import note

_TRIES = 3
_ARCHIVES = Path("/var/cache/apt/archives")


@dataclass(frozen=True)
class Need:
    """A program, the Debian package that provides it, and its purpose. An absolute path is any file."""

    program: str
    package: str
    purpose: str

    @property
    def met(self) -> bool:
        """Whether it is installed."""
        return os.path.exists(self.program) if self.program.startswith("/") else shutil.which(self.program) is not None


NEEDS = (
    Need("qemu-system-arm", "qemu-system-arm", "32-bit boards"),
    Need("qemu-system-aarch64", "qemu-system-arm", "64-bit boards"),
    Need("mmdebstrap", "mmdebstrap", "root file systems"),
    Need("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring", "signatures of Debian's archive"),
    Need("arm-linux-gnueabi-as", "binutils-arm-linux-gnueabi", "A32 guest payload"),
    Need("aarch64-linux-gnu-as", "binutils-aarch64-linux-gnu", "A64 guest payload"),
    Need("zstd", "zstd", "modules and images of newer Debian kernels"),
    Need("arm-linux-gnueabi-gcc", "gcc-arm-linux-gnueabi", "32-bit kernels"),
    Need("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu", "64-bit kernels"),
    Need("gcc", "gcc", "the recorder's probe, tools of the kernel's build"),
    Need("/usr/include/stdio.h", "libc6-dev", "the recorder's probe, tools of the kernel's build"),
    Need("make", "make", "kernels"),
    Need("flex", "flex", "kernel configuration"),
    Need("bison", "bison", "kernel configuration"),
    Need("bc", "bc", "kernels"),
    Need("patch", "patch", "patch series"),
    Need("/usr/include/openssl/ssl.h", "libssl-dev", "tools of newer kernels' builds"),
)


def missing() -> list[str]:
    """The packages that are not installed, without duplicates."""
    return list(dict.fromkeys(need.package for need in NEEDS if not need.met))


def install() -> list[str]:
    """Install what is missing and return the packages' names. Raises SetupError; not as root, with the line to run."""
    packages = missing()
    if not packages:
        return []
    if shutil.which("apt-get") is None:
        lacking = [f"{need.program} ({need.purpose}; Debian: {need.package})" for need in NEEDS if not need.met]
        raise SetupError(
            "system packages are missing, and this machine has no apt-get to install them with",
            remedy="install them in this machine's own way:\n  " + "\n  ".join(lacking),
        )
    line = f"apt-get update && apt-get install -y --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0:
        raise SetupError("system packages are missing and you are not root", remedy=f"run as root: {line}")
    for _ in range(_TRIES):
        if _apt("update"):
            break
    else:
        note("apt-get update fails (a mirror in the middle of a sync?); going on with the index that exists")
    note(f"installing {' '.join(packages)}")
    for _ in range(_TRIES):
        if _apt("install", "-y", "--no-install-recommends", *packages):
            return packages
        _apt("update")
    raise SetupError("apt-get fails to install the packages", remedy=f"run it by hand and read its output: {line}")


def _apt(*arguments: str) -> bool:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    argv = ["apt-get", "-q", "-o", "Dpkg::Use-Pty=0", *arguments]
    if is_full(_ARCHIVES):  # apt would wait for ever
        raise disk_full(_ARCHIVES)
    return subprocess.run(argv, env=environment, stdout=subprocess.DEVNULL).returncode == 0
