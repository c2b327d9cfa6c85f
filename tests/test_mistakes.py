"""Wrong input from users: a plain error before anything boots, no skip, no hang and no traceback."""

import os
import subprocess
import sys

import pytest
from arm_kvm.support.errors import ConfigError, KernelError, SetupError, TraceError
from arm_kvm.support.paths import CONFIGS, ROOT

ARM64 = (CONFIGS / "hosts/arm64.yaml").read_text()
A15 = (CONFIGS / "hosts/a15.yaml").read_text()
USAGE = 2  #: argparse's, and ConfigError's
PYTEST_USAGE = 4
LONG = "x" * 5000


def run(arguments, folder, **environment):
    """Run a module; returns exit code and output. Fails on a traceback, or after 60 s."""
    env = os.environ | {"ARM_KVM_OFFLINE": "1"} | environment
    argv = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        argv, cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "INTERNALERROR" not in said, said
    return done.returncode, said


HOST_FILES = {
    "YAML's own word for true": (ARM64, "cpus: 2", "cpus: yes", "cpus: yes is not a number from 1 to 64"),
    "no value": (ARM64, "cpus: 2", "cpus:", "cpus: nothing is not a number from 1 to 64"),
    "a list for a size": (ARM64, "memory: 1G", "memory: [1G]", "memory: ['1G'] is not a size like 512M or 1G"),
    "time out of range": (ARM64, "guests:", "timeouts: {ssh: 0}\nguests:", "is not a number from 1 to 3600 (seconds)"),
    "a guest twice": (ARM64, "[A64, A32]", "[A64, A64]", "guests: 'A64' is there twice"),
    "a module's path": (ARM64, "[virtio_mmio", "[../../x, virtio_mmio", "'../../x' is not the name of a module"),
    "an option for a package": (ARM64, "linux-image-arm64", "--version", "is not the name of a Debian package"),
    "a path for a suite": (ARM64, "suite: bookworm", "suite: ../x", "'../x' is not the name of a Debian suite"),
    "a fragment's path": (
        A15,
        "[arm-virt, lab]",
        "[../../x, lab]",
        "no kernel fragment '../../x'; there are: arm-virt",
    ),
    "a URL of a file": (A15, "url: ", "url: file://", "is not a URL that begins with http:// or https://"),
    "not UTF-8": (ARM64, "board:", "# \udcff\nboard:", "it is not text in UTF-8"),
}


@pytest.mark.parametrize("what", HOST_FILES)
def test_host_files(tmp_path, what):
    good, old, new, words = HOST_FILES[what]
    assert old in good
    (tmp_path / "mine.yaml").write_bytes(good.replace(old, new, 1).encode(errors="surrogateescape"))
    code, said = run(["arm_kvm", "kernel", "fetch", "mine.yaml"], tmp_path)
    assert code == ConfigError.exit_code and words in said


COMMANDS = {
    "a digit that is none": ("conform --cases ²", USAGE, "'²' is not a number above 0"),
    "a seed below 0": ("conform --seed -1", USAGE, "'-1' is not a seed from 0 to 4294967295"),
    "no time at all": ("stage2 arm64 --seconds -1", USAGE, "'-1' is not a number of seconds above 0, up to 3600"),
    "for ever": ("stage2 arm64 --seconds inf", USAGE, "'inf' is not a number of seconds"),
    "fewer than no workers": ("mutate -n -1", USAGE, "'-1' is not a number of workers"),
    "a sequence that never ends": ("replay /dev/zero", ConfigError.exit_code, "/dev/zero: not a file"),
    "a sequence from a pipe": ("replay fifo", ConfigError.exit_code, "fifo: not a file"),
    "a trace from a pipe": ("trace check fifo", TraceError.exit_code, "fifo: not a file"),
    "a host file from a pipe": ("kernel fetch ./fifo.yaml", ConfigError.exit_code, "fifo.yaml: not a file"),
    "a folder for a host": ("kernel fetch /tmp", ConfigError.exit_code, "not a host file: those end in .yaml"),
    "a tree that is a file": ("kernel build a15 --tree /etc/passwd", KernelError.exit_code, "not a kernel source tree"),
    "no benchmark": ("bench -- -k nosuchbenchmark", 5, "no benchmark was run"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_commands(tmp_path, what):
    line, code, words = COMMANDS[what]
    for name in ("fifo", "fifo.yaml"):
        os.mkfifo(tmp_path / name)
    got, said = run(["arm_kvm", *line.split()], tmp_path)
    assert got == code and words in said


OPTIONS = {
    "a path that is too long": (["--host", "arm64", "--kernel", f"/{LONG}"], "there is no such file or folder"),
    "a link to itself": (["--host", "arm64", "--kernel", "loop"], "there is no such file or folder"),
    "a device": (["--host", "arm64", "--kernel", "/dev/zero"], "it is not a file"),
    "artifacts in a file": (["--host", "arm64", "--artifacts", "/etc/passwd"], "no folder that can be written"),
    "artifacts nowhere": (["--host", "arm64", "--artifacts", ""], "no folder that can be written"),
    "mutants of no KVM": (["--host", "a15-debian", "--mutate", "all"], "none of these hosts has a KVM to break"),
    "a host's folder": (["--host", "/tmp"], "not a host file: those end in .yaml"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(tmp_path, what):
    options, words = OPTIONS[what]
    (tmp_path / "loop").symlink_to("loop")
    code, said = run(["pytest", "-p", "no:cacheprovider", *options, str(ROOT / "testcases/boot")], tmp_path)
    assert code == PYTEST_USAGE and words in said


def test_no_shell_in_path(tmp_path):
    code, said = run(["arm_kvm", "conform", "--host", "arm64", "--cases", "1"], tmp_path, PATH="/none")
    assert code == SetupError.exit_code and "sh is not installed, or not in PATH" in said


def test_no_folder_for_machines(tmp_path):
    code, said = run(["arm_kvm", "conform", "--host", "arm64", "--cases", "1"], tmp_path, XDG_RUNTIME_DIR="/proc")
    assert code == SetupError.exit_code and "set XDG_RUNTIME_DIR" in said


def test_a_folder_that_is_gone(tmp_path):
    (tmp_path / "gone").mkdir()
    line = f'cd gone && rmdir ../gone && "{sys.executable}" -m arm_kvm hosts'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == USAGE and "is gone" in done.stderr and "Traceback" not in done.stderr
