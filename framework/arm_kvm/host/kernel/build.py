"""Build a kernel out of tree from ``allnoconfig`` and the fragments in ``images/kernel``."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path

from arm_kvm.support.errors import BuildFailed, ConfigError, LabError, NoKvm, SetupError
from arm_kvm.support.guardian import spawn
from arm_kvm.support.hints import hint
from arm_kvm.support.limits import disk_full
from arm_kvm.support.paths import IMAGES
from arm_kvm.support.programs import run
from arm_kvm.support.progress import note, task

_TAIL = 25


@dataclass(frozen=True)
class Toolchain:
    """How to build for one architecture: ARCH, CROSS_COMPILE, make target, the image's path in the build folder."""

    arch: str
    prefix: str
    target: str
    image: str
    objects: int  #: files compiled for the lab's own configuration, for the progress bar

    def version(self) -> str:
        """The first line of the compiler's --version, an input of every build. Raises SetupError."""
        for program in (f"{self.prefix}gcc", "gcc", "make", "flex", "bison", "bc"):
            if shutil.which(program) is None:
                raise SetupError(f"{program} is not installed: kernels cannot be built", remedy="run `arm-kvm setup`")
        return run([f"{self.prefix}gcc", "--version"]).stdout.splitlines()[0]


#: 32-bit Arm uses the soft-float compiler: with the hard-float one 5.4 falls back to Armv5 and fails.
TOOLCHAINS = {
    "arm": Toolchain("arm", "arm-linux-gnueabi-", "zImage", "arch/arm/boot/zImage", 1700),
    "arm64": Toolchain("arm64", "aarch64-linux-gnu-", "Image", "arch/arm64/boot/Image", 1900),
}


def fragment_files(names: list[str]) -> list[Path]:
    """The files of these fragments. Raises ConfigError, which suggests the nearest name for an unknown one."""
    known = {path.stem: path for path in sorted((IMAGES / "kernel").glob("*.config"))}
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no kernel fragment {name!r}; {hint(name, known, 'there are')}")
    return [known[name] for name in names]


def _wanted(fragments: list[Path]) -> dict[str, str]:
    text = "\n".join(f.read_text() for f in fragments)
    return dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.M))


class Build:
    """A build of ``source`` in ``folder``, which may contain an interrupted build of the same inputs."""

    def __init__(self, source: Path, folder: Path, arch: str, fragments: list[Path]) -> None:
        self._source = source
        self._folder = folder
        self._tools = TOOLCHAINS[arch]
        self._fragments = fragments
        self._log = folder.parent / "build.log"

    def run(self) -> Path:
        """Configure and compile, and return the image's path. Raises BuildFailed, NoKvm, SetupError, DiskFull."""
        self._folder.mkdir(exist_ok=True)
        self._log.unlink(missing_ok=True)
        self._configure()
        title = f"build Linux {self.version()} ({self._tools.arch})"
        self._make(self._tools.target, title=title, total=self._tools.objects)
        return self._folder / self._tools.image

    def version(self) -> str:
        """VERSION.PATCHLEVEL.SUBLEVEL of the source tree. Raises BuildFailed if it is not a kernel tree."""
        try:
            head = (self._source / "Makefile").read_text(errors="replace")[:2000]
        except OSError as e:
            raise BuildFailed(f"{self._source} is not a kernel source tree: {e.strerror}: Makefile") from e
        found = [re.search(rf"^{key}\s*=\s*(\d+)", head, re.M) for key in ("VERSION", "PATCHLEVEL", "SUBLEVEL")]
        parts = [match[1] for match in found if match]
        if len(parts) < len(found):
            raise BuildFailed(f"{self._source}/Makefile names no kernel version: not a kernel source tree")
        return ".".join(parts)

    def _configure(self) -> None:
        config = self._folder / "fragments.config"
        config.write_text("\n".join(f.read_text() for f in self._fragments))
        self._make(f"KCONFIG_ALLCONFIG={config}", "allnoconfig", title="configure", total=None)
        made = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", (self._folder / ".config").read_text(), re.M))
        missing = [name for name, value in _wanted(self._fragments).items() if made.get(name) != value]
        if "CONFIG_KVM" in missing:
            raise NoKvm(
                f"Linux {self.version()} does not take CONFIG_KVM for {self._tools.arch}",
                remedy="32-bit Arm hosts need Linux 3.9 to 5.6",
            )
        if missing:
            note(f"this kernel does not have or does not accept: {' '.join(missing)}")

    def _make(self, *targets: str, title: str, total: int | None) -> None:
        argv = [
            *("make", "-C", str(self._source), f"O={self._folder}", f"-j{os.cpu_count()}"),
            *(f"ARCH={self._tools.arch}", f"CROSS_COMPILE={self._tools.prefix}", *targets),
        ]
        if "KBUILD_HOSTCFLAGS" in (self._source / "Makefile").read_text(errors="replace"):
            argv.append("HOSTCFLAGS=-fcommon")  # before about 5.4.20 dtc defines yylloc twice
        environment = os.environ | {"KBUILD_BUILD_USER": "arm-kvm", "KBUILD_BUILD_HOST": "lab", "LC_ALL": "C"}
        process, guardian = spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        assert process.stdout is not None, "a pipe, see above"
        output = TextIOWrapper(process.stdout, errors="replace")
        try:
            with self._log.open("a", buffering=1) as log, task(title, total, "files") as step:
                for line in output:
                    log.write(line)
                    if line.startswith("  ") and line[2:4].strip():
                        step(1, line.split()[-1][-30:])
                if process.wait():
                    raise self._failure(title)
        finally:
            if process.poll() is None:  # Ctrl-C
                guardian.fire()
                process.wait()
            guardian.cancel()

    def _failure(self, title: str) -> LabError:
        lines = self._log.read_text(errors="replace").splitlines()
        tail = "\n".join(lines[-_TAIL:])
        if os.strerror(errno.ENOSPC) in tail:
            return disk_full(self._folder, "the kernel's build stopped")
        errors = [line for line in lines if re.search(r"\berror\b|\*\*\*", line, re.I)]
        first = errors[0] if errors else "see below"
        return BuildFailed(f"{title} failed: {first}", remedy=f"the whole log is {self._log}", evidence=tail)
