"""The four kernel sources: images recognised, trees built once, interruptions survived, refusals said.

The tree here is small: a Makefile that takes the steps of a kernel build (allnoconfig, zImage) in a second.
What is tested is the lab's side: keys, locks, patches, resumption. Real kernels are built by the users of
`arm-kvm kernel build`.
"""

import gzip
import hashlib
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
from arm_kvm.host import config
from arm_kvm.host.kernel import kernel, obtain, tree
from arm_kvm.host.kernel.sources import from_argument
from arm_kvm.support.errors import BuildFailed, DiskFull, KernelError, NoKvm, Offline, SetupError, WrongChecksum
from arm_kvm.support.paths import CONFIGS

ZIMAGE = bytes(0x24) + b"\x18\x28\x6f\x01" + bytes(64)
IMAGE = bytes(0x38) + b"ARM\x64" + bytes(64)

MAKEFILE = """\
VERSION = 5
PATCHLEVEL = 4
SUBLEVEL = 999
# the real one sets KBUILD_HOSTCFLAGS
.PHONY: allnoconfig zImage
allnoconfig:
\tcp $(KCONFIG_ALLCONFIG) $(O)/.config
zImage:
\t@echo "  CC      init/main.o"
\techo run >> $(O)/../../runs
\tsleep $$(cat pause)
\tmkdir -p $(O)/arch/arm/boot && cp image $(O)/arch/arm/boot/zImage
"""


@pytest.fixture
def source(tmp_path):
    """A small source tree."""
    folder = tmp_path / "linux-small"
    (folder / "arch/arm").mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "Kconfig").write_text("")
    (folder / "pause").write_text("0")
    (folder / "image").write_bytes(ZIMAGE)
    return folder


@pytest.fixture
def runs(own_cache):
    """How often the small tree's compiler ran."""

    def count():
        return sum(len(f.read_text().splitlines()) for f in own_cache.glob("kernels/*/runs")) + sum(
            len(f.read_text().splitlines()) for f in own_cache.glob("kernels/runs")
        )

    return count


A15 = config.find("a15")


# -- images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "arch"),
    [(ZIMAGE, "arm"), (IMAGE, "arm64"), (gzip.compress(IMAGE), "arm64"), (b"MZ" + bytes(100), None), (b"", None)],
)
def test_images_are_known_by_their_headers(tmp_path, data, arch):
    path = tmp_path / "image"
    path.write_bytes(data)
    assert kernel.architecture_of(path) == arch


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"\x7fELF", "is not an Arm kernel image"), (IMAGE, "is an arm64 kernel; this host needs a 32-bit Arm one")],
)
def test_a_wrong_image_is_refused(tmp_path, data, message):
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(KernelError, match=message):
        from_argument(A15, str(path))


def test_an_unreadable_image_is_refused(tmp_path):
    with pytest.raises(KernelError, match="there is no such file or folder"):
        from_argument(A15, str(tmp_path / "zImage"))
    (tmp_path / "broken").write_bytes(gzip.compress(IMAGE)[:20])
    with pytest.raises(KernelError, match="cannot read"):
        from_argument(A15, str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "a15",
            ZIMAGE[:0x28] + (0).to_bytes(4, "little") + (1 << 20).to_bytes(4, "little"),
            "is truncated: 48 of 1,048,576",
        ),
        ("arm64", gzip.compress(IMAGE + os.urandom(5000))[:3000], "ended before the end-of-stream marker"),
    ],
)
def test_an_image_that_was_cut_is_refused(tmp_path, name, data, words):
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(KernelError, match=words):
        from_argument(config.find(name), str(tmp_path / "image"))


def test_a_debian_image_that_was_cut_is_refused(tmp_path):
    """The size of an arm64 Image follows from the section table of its EFI header."""
    whole = obtain(config.find("arm64")).image
    assert kernel.check_image(whole, "arm64")
    (tmp_path / "Image").write_bytes(whole.read_bytes()[:20_000_000])
    with pytest.raises(KernelError, match="is truncated: 20,000,000 of 3"):
        kernel.check_image(tmp_path / "Image", "arm64")
    at = int.from_bytes(whole.read_bytes()[0x3C:0x40], "little")
    for size in (62, at + 6):
        (tmp_path / "Image").write_bytes(whole.read_bytes()[:size])
        with pytest.raises(KernelError, match="is truncated"):
            kernel.check_image(tmp_path / "Image", "arm64")


def test_a_debian_argument_needs_package_and_suite():
    with pytest.raises(KernelError, match="deb:PACKAGE@SUITE"):
        from_argument(A15, "deb:linux-image-arm64")


def test_a_file_kernel_lies_beside_its_host_file(tmp_path):
    (tmp_path / "zImage").write_bytes(ZIMAGE)
    text = (CONFIGS / "hosts/a15.yaml").read_text()
    start, end = text.index("kernel:"), text.index("rootfs:")
    (tmp_path / "mine.yaml").write_text(text[:start] + "kernel: {source: file, image: zImage}\n" + text[end:])
    assert obtain(config.find(str(tmp_path / "mine.yaml"))).image == tmp_path / "zImage"


# -- builds -----------------------------------------------------------------------------------------


def test_a_tree_is_built_once(source, own_cache):
    first = from_argument(A15, str(source))
    (source / "Makefile").touch()
    second = from_argument(A15, str(source))
    assert first == second and first.image.read_bytes() == ZIMAGE
    assert first.name == "Linux 5.4.999 (tree linux-small)"


def test_every_input_is_in_the_key(source, own_cache):
    before = from_argument(A15, str(source)).image
    (source / "arch/arm/new.c").write_text("int x;")
    assert from_argument(A15, str(source)).image != before
    one = tree.from_tree(source, "arm", ["arm-virt", "lab"], [])
    other = tree.from_tree(source, "arm", ["arm-virt", "lab", "debug"], [])
    assert one.image != other.image


def test_patches_apply_to_a_copy(source, own_cache, tmp_path):
    patch = tmp_path / "0001.patch"
    patch.write_text("--- a/pause\n+++ b/pause\n@@ -1 +1 @@\n-0\n\\ No newline at end of file\n+0.1\n")
    built = tree.from_tree(source, "arm", ["arm-virt", "lab"], [patch])
    assert built.name.endswith("+ 1 patches)") and (source / "pause").read_text() == "0"
    patch.write_text(patch.read_text().replace("-0", "-7"))
    with pytest.raises(BuildFailed, match="does not apply"):
        tree.from_tree(source, "arm", ["arm-virt", "lab"], [patch])
    with pytest.raises(KernelError, match="cannot read the patch"):
        tree.from_tree(source, "arm", ["arm-virt", "lab"], [tmp_path / "none.patch"])


def test_a_tarball_is_checked_unpacked_and_built(source, own_cache, tmp_path):
    path = tmp_path / "linux-small.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        archive.add(source, "linux-5.4.999")
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    assert tree.from_tarball(path, sha, "arm", ["arm-virt", "lab"]).image.read_bytes() == ZIMAGE
    text = (CONFIGS / "hosts/a15.yaml").read_text()
    start, end = text.index("  url:"), text.index("  fragments:")
    (tmp_path / "mine.yaml").write_text(f"{text[:start]}  path: {path.name}\n  sha256: '{'0' * 64}'\n{text[end:]}")
    with pytest.raises(WrongChecksum, match=sha):
        obtain(config.find(str(tmp_path / "mine.yaml")))


def test_the_configured_tarball_gives_way_to_a_cached_kernel(source, own_cache, monkeypatch):
    monkeypatch.setenv("ARM_KVM_OFFLINE", "1")
    with pytest.raises(KernelError, match="not cached"):
        obtain(A15)
    from_argument(A15, str(source))
    assert (
        obtain(A15).name == "Linux 5.4.999 (tree linux-small), from the cache in place of linux-5.4.302.tar.xz: offline"
    )


def test_a_build_of_another_series_does_not_take_its_place(source, own_cache, monkeypatch):
    monkeypatch.setenv("ARM_KVM_OFFLINE", "1")
    (source / "Makefile").write_text(MAKEFILE.replace("PATCHLEVEL = 4", "PATCHLEVEL = 2"))
    assert "Linux 5.2.999" in from_argument(A15, str(source)).name
    with pytest.raises(Offline, match="linux-5.4.302.tar.xz is not cached"):
        obtain(A15)


def test_a_tree_without_kvm_is_said_before_it_is_compiled(source, own_cache):
    makefile = source / "Makefile"
    makefile.write_text(MAKEFILE.replace("cp $(KCONFIG_ALLCONFIG)", "grep -v CONFIG_KVM= $(KCONFIG_ALLCONFIG) >"))
    with pytest.raises(NoKvm, match="does not take CONFIG_KVM") as caught:
        from_argument(A15, str(source))
    assert "3.9 to 5.6" in caught.value.remedy


def test_a_failing_build_shows_its_own_words(source, own_cache):
    (source / "Makefile").write_text(MAKEFILE.replace("sleep", "echo main.c: error: no such thing && false && sleep"))
    with pytest.raises(BuildFailed, match="no such thing") as caught:
        from_argument(A15, str(source))
    assert "build.log" in caught.value.remedy


def test_a_build_on_a_full_disk(source, own_cache):
    (source / "Makefile").write_text(MAKEFILE.replace("sleep", "cp image /dev/full && sleep"))
    with pytest.raises(DiskFull):
        from_argument(A15, str(source))


def test_a_tree_that_is_not_clean_or_not_a_tree(source, own_cache, tmp_path):
    (source / ".config").write_text("")
    with pytest.raises(BuildFailed, match="built in place") as caught:
        from_argument(A15, str(source))
    assert "mrproper" in caught.value.remedy
    (tmp_path / "empty").mkdir()
    with pytest.raises(KernelError, match="not a kernel source tree"):
        from_argument(A15, str(tmp_path / "empty"))


def test_no_compiler(source, own_cache, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SetupError, match="arm-linux-gnueabi-gcc is not installed"):
        from_argument(A15, str(source))


BUILDER = "import sys; from arm_kvm.host import config; from arm_kvm.host.kernel.sources import from_argument\n"
BUILDER += "print(from_argument(config.find('a15'), sys.argv[1]).image)"


def builder(source):
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, str(source)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_processes_build_once(source, runs):
    (source / "pause").write_text("1")
    both = [builder(source) for _ in range(2)]
    images = {p.communicate(timeout=60)[0] for p in both}
    assert len(images) == 1 and images != {""}
    assert runs() == 1


def sleepers():
    return subprocess.run(["pgrep", "-f", "^sleep 47.11"], capture_output=True, text=True).stdout.split()


def test_a_killed_build_leaves_no_compiler_and_goes_on(source, own_cache, runs):
    (source / "pause").write_text("47.11")
    process = builder(source)
    while not sleepers():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(100):
        if not sleepers():
            break
        time.sleep(0.05)
    assert sleepers() == []
    assert list(own_cache.glob("kernels/*/meta.json")) == []
    (source / "pause").write_text("0")
    assert from_argument(A15, str(source)).image.exists()
