"""Options of the plugin: hosts, kernels and paths, and one usage error for every mistake."""

import os
import re
import socket
import subprocess
import sys

import pytest
from arm_kvm.support.paths import CONFIGS, ROOT

from ..pytest_run import PASSING


def test_the_header_names_qemu_kernel_and_guests(run):
    code, said = run(PASSING, "--host", "arm64")
    assert code == 0 and "2 passed" in said
    assert re.search(r"arm64: QEMU [\d.]+, cortex-a57 x2; Linux 6\.1\S* \(Debian .*\); guests A64/A32", said)


def test_a_kernel_that_cannot_be_fetched_is_one_plain_skip(run, empty_cache):
    suite = PASSING + PASSING.replace("test_vm_runs", "test_again")
    code, said = run(suite, "--host", "a15", **empty_cache)
    assert code == 5 and "2 skipped" in said
    assert "arm-kvm: nothing was judged: all 2 cases were skipped" in said
    (line,) = [line for line in said.splitlines() if line.startswith("SKIPPED")]
    assert "[2]" in line and "a15: linux-5.4.302.tar.xz is not cached" in line and "--kernel PATH" in line


def test_require_kvm_makes_it_a_failure(run, empty_cache):
    code, said = run(PASSING, "--host", "a15", "--require-kvm", **empty_cache)
    assert code == 1 and "1 error" in said
    assert "host a15 cannot be used: linux-5.4.302.tar.xz is not cached" in said and "Traceback" not in said


def test_a_source_tree_with_an_unreadable_file(run, tmp_path):
    tree = tmp_path / "linux"
    (tree / "arch/arm").mkdir(parents=True)
    (tree / "Kconfig").touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(tree / "pipe"))
        code, said = run(PASSING, "--host", "a15", "--require-kvm", "--kernel", str(tree))
    assert code == 1 and "Traceback" not in said
    assert (
        f"host a15 cannot be used: {tree}/pipe: No such device or address" in said and "owner and permissions" in said
    )


def test_a_given_kernel_without_kvm(run, tmp_path):
    """The kernel boots on the A15 in HYP mode, but has no KVM, which the host file promises."""
    text = (CONFIGS / "hosts/a15-debian.yaml").read_text()
    (tmp_path / "a15x.yaml").write_text(text.replace("can: [a15]\nguests: []", "can: [kvm, a15]\nguests: [A32]"))
    suite = PASSING + PASSING.replace("test_vm_runs", "test_again")
    code, said = run(suite, "--host", "a15x.yaml")
    assert code == 1 and "2 errors" in said
    assert "boots but has no KVM in it" in said and "--kernel PATH" in said


def wrong_kernels(tmp_path):
    (tmp_path / "Image").write_bytes(bytes(0x38) + b"ARM\x64" + bytes(64))
    (tmp_path / "zImage").write_bytes(bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(64))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no kernel")
    os.mkfifo(tmp_path / "pipe")


WRONG_KERNELS = {
    "nothing": ("", "there is no such file or folder"),
    "a path that is not there": ("/nowhere/Image", "there is no such file or folder"),
    "in the home of an unknown user": ("~nosuchuser/Image", "there is no such user"),
    "another architecture's": ("zImage", "is a 32-bit Arm kernel; this host needs an arm64 one"),
    "no kernel": ("text", "is not an Arm kernel image"),
    "a pipe": ("pipe", "it is not a file"),
    "a folder that is no tree": ("folder", "is not a kernel source tree"),
    "a host that is not there": ("arm46=Image", "no host is called 'arm46'"),
    "a host that does not run": ("a15=Image", "host a15 does not run"),
    "a package without a suite": ("deb:linux-image-arm64", "deb:PACKAGE@SUITE"),
    "a suite without a package": ("deb:@sid", "deb:PACKAGE@SUITE"),
    "an unknown suite": ("deb:linux-image-arm64@nosuch", "Debian has no suite 'nosuch'"),
    "an unknown package": ("deb:linux-image-arm46@bookworm", "did you mean linux-image-arm64?"),
}


@pytest.mark.parametrize("what", WRONG_KERNELS)
def test_a_wrong_kernel_is_reported_before_anything_boots(run, tmp_path, what):
    """By pytest's usage error (4) and not by a skip. A pipe is not read, which could take forever."""
    wrong_kernels(tmp_path)
    kernel, words = WRONG_KERNELS[what]
    code, said = run(PASSING, "--host", "arm64", "--kernel", kernel)
    assert code == 4 and words in said and "Traceback" not in said, said
    assert not list(tmp_path.glob("artifacts/hosts/*"))


def test_one_image_for_two_hosts(run, tmp_path):
    wrong_kernels(tmp_path)
    code, said = run(PASSING, "--host", "arm64", "--host", "a15", "--kernel", "Image")
    assert code == 4 and "is an arm64 kernel; this host needs a 32-bit Arm one" in said
    assert "--kernel HOST=" in said


def test_two_hosts_of_one_name(run, tmp_path):
    (tmp_path / "arm64.yaml").write_text((CONFIGS / "hosts/arm64.yaml").read_text())
    code, said = run(PASSING, "--host", "arm64", "--host", "arm64.yaml")
    assert code == 4 and "two hosts are called 'arm64'" in said


@pytest.mark.parametrize("count", ["0", "-3"])
def test_no_sequences(run, count):
    code, said = run(PASSING, "--host", "arm64", "--count", count)
    assert code == 4 and f"--count {count}: play at least one sequence" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "arm46"], "did you mean 'arm64'"),
        (["--host", "none.yaml"], "No such file"),
        (["--host", "arm64", "--kernel", "a15=zImage"], "host a15 does not run"),
        (["--host", "arm64", "--kernel", "zImage", "--kernel", "Image"], "every host has one already: zImage"),
    ],
)
def test_a_wrong_option_is_a_usage_error(run, options, words):
    code, said = run(PASSING, *options)
    assert code == 4 and words in said and "Traceback" not in said


def test_a_kernel_elsewhere_on_the_disk_is_not_a_test_path(tmp_path):
    """`--kernel PATH` and `--artifacts DIR` with paths that exist, as `tox -e arm-kvm --` passes them."""
    (tmp_path / "zImage").write_bytes(bytes(0x38) + b"ARM\x64" + bytes(64))
    argv = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--collect-only", "-q"]
    argv += ["--host", "arm64", "--kernel", str(tmp_path / "zImage"), "--artifacts", str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "testcases/stage2/test_mmio.py::" in done.stdout, done.stderr


def test_a_file_outside_the_root_folder(run, tmp_path):
    """pytest has no path for it, but its artifacts still have a folder."""
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    suite = tmp_path / "elsewhere/test_mine.py"
    suite.write_text(PASSING)
    options = ["--host", "arm64", "-k", "A64", "--rootdir", str(tmp_path / "root"), str(suite)]
    code, said = run("", *options)
    assert code == 0 and "1 passed" in said, said
    assert list((tmp_path / "artifacts").rglob("console.log"))
