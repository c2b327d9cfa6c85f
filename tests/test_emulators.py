"""Choosing the QEMU of a host's board, like a kernel; what is not a QEMU is refused before anything boots."""

import os
import platform
import shutil
from pathlib import Path

import pytest
from arm_kvm.host import config, emulators, snapshots
from arm_kvm.machine.emulator import Emulator
from arm_kvm.recorder import library
from arm_kvm.support import apt
from arm_kvm.support.errors import EmulatorError, NoArchive, SetupError

from .pytest_run import Run

A15, ARM64 = config.find("a15"), config.find("arm64")
#: A suite whose QEMU differs from this machine's.
OTHER = "trixie" if platform.freedesktop_os_release()["VERSION_CODENAME"] == "bookworm" else "bookworm"


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def wrapper(folder, program="qemu-system-aarch64", before=""):
    """A build folder whose QEMU is the installed one, with a line of shell before it starts."""
    folder.mkdir(exist_ok=True)
    script(folder / program, f'{before}\nexec {shutil.which(program)} "$@"')
    return folder


# -- what may be chosen ------------------------------------------------------------------------------------------------


def test_the_installed_one_is_the_default():
    assert emulators.fitted(ARM64) is ARM64 and emulators.fitted(ARM64, "installed") is ARM64
    assert ARM64.board.qemu == Emulator.installed("qemu-system-aarch64")
    assert ARM64.board.qemu.version >= (7, 2) and ARM64.board.qemu.name.startswith("QEMU ")


@pytest.mark.parametrize("inside", [".", "build", "bin"])
def test_a_folder_it_was_built_in(tmp_path, inside):
    (tmp_path / inside).mkdir(exist_ok=True)
    program = wrapper(tmp_path / inside) / "qemu-system-aarch64"
    for what in (tmp_path, program):
        found = emulators.fitted(ARM64, str(what)).board.qemu
        assert found.command == (str(program),) and found.version == ARM64.board.qemu.version
        assert found.name == f"{ARM64.board.qemu.name} ({what})"


def test_a_host_file_names_one_beside_it(tmp_path):
    wrapper(tmp_path / "qemu")
    (tmp_path / "mine.yaml").write_text((ARM64.path).read_text() + "emulator: qemu\n")
    host = config.find(str(tmp_path / "mine.yaml"))
    emulators.check(host)
    assert emulators.fitted(host).board.qemu.command == (str(tmp_path / "qemu/qemu-system-aarch64"),)
    assert emulators.fitted(host, "installed").board.qemu == ARM64.board.qemu


def test_another_qemu_is_another_snapshot(tmp_path):
    kernel = type("Kernel", (), {"image": tmp_path / "image", "modules": []})
    kernel.image.write_bytes(b"kernel")
    mine = emulators.fitted(ARM64, str(wrapper(tmp_path / "one")))
    other = emulators.fitted(ARM64, str(wrapper(tmp_path / "two", before="true")))
    keys = {snapshots.key_of(host, kernel) for host in (ARM64, mine, other)}
    assert len(keys) == 3


WRONG = {
    "nothing": ("", "no such file or folder"),
    "a path that is not there": ("{tmp}/nowhere", "no such file or folder"),
    "a folder without it": ("{tmp}", "there is no qemu-system-aarch64 in the folder"),
    "a file that cannot be run": ("{tmp}/text", "is not a program"),
    "the other program": ("{tmp}/qemu-system-arm", "this host's board needs qemu-system-aarch64"),
    "a suite without a name": ("deb:", "is written deb:SUITE"),
    "a suite with a package": ("deb:qemu@trixie", "is written deb:SUITE"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_one_is_refused_before_anything_boots(tmp_path, what):
    (tmp_path / "text").write_text("no program")
    script(tmp_path / "qemu-system-arm", "exit")
    chosen, message = WRONG[what]
    with pytest.raises(EmulatorError, match=message):
        emulators.check(ARM64, chosen.format(tmp=tmp_path))


@pytest.mark.parametrize(("text", "message"), [("echo hello", "is not a QEMU"), ("exit 3", "is not a QEMU")])
def test_a_program_that_is_no_qemu(tmp_path, text, message):
    with pytest.raises(EmulatorError, match=message) as caught:
        emulators.fitted(ARM64, str(script(tmp_path / "qemu", text)))
    assert "--qemu" in caught.value.remedy


def test_a_qemu_that_is_not_installed():
    gone = Emulator.installed("qemu-system-none")
    assert gone.name == "qemu-system-none is not installed"
    with pytest.raises(SetupError, match="is not installed"):
        _ = gone.version


def test_pytest_says_so_and_runs_nothing(tmp_path):
    code, said = Run(tmp_path)("def test_it(host): pass", "--host", "arm64", "--qemu", "/nowhere")
    assert code == 4 and "--qemu '/nowhere': there is no such file or folder" in said and "Remedy:" in said
    code, said = Run(tmp_path)("def test_it(host): pass", "--host", "arm64", "--qemu", "a15=installed")
    assert code == 4 and "host a15 does not run" in said


# -- another suite's package ------------------------------------------------------------------------------------------


def test_another_suites_qemu_records_and_restores(tmp_path):
    """It runs from the cache with its own libraries, the run's header names it, and both recorders agree on it."""
    version = ".".join(map(str, emulators.obtain("qemu-system-aarch64", f"deb:{OTHER}").version))
    suite = (Path(__file__).parent / "test_recorder.py").read_text().partition("# -- what can be wrong")[0]
    options = ["--host", "arm64", "--qemu", f"deb:{OTHER}", "-k", "mechanisms or off_means_off"]
    code, said = Run(tmp_path)(suite, *options)
    assert code == 0 and "2 passed" in said, said
    assert f"arm64: QEMU {version} (deb:{OTHER})" in said
    assert version != ".".join(map(str, ARM64.board.qemu.version))


def test_a_suite_that_is_not_there(own_cache, monkeypatch):
    monkeypatch.setattr(apt, "_TRIES", 1)
    with pytest.raises(EmulatorError, match="no QEMU of nosuch: Debian has no suite 'nosuch'"):
        emulators.obtain("qemu-system-arm", "deb:nosuch")


# -- plugins ----------------------------------------------------------------------------------------------------------


def test_without_plugins_what_records_nothing_still_runs(tmp_path):
    """A missing probe is an error of the cases that record, and of no others."""
    refuses = 'case "$*" in *-plugin*) echo "-plugin: invalid option" >&2; exit 1;; esac'
    suite = """
def test_records(vm, record):
    with record():
        vm.guest.ping()

def test_does_not(vm):
    vm.guest.ping()
"""
    qemu = wrapper(tmp_path / "qemu", before=refuses)
    code, said = Run(tmp_path)(suite, "--host", "arm64", "--qemu", str(qemu), "-k", "A64")
    assert code == 1 and "1 passed, " in said and "1 error" in said, said
    assert "takes no TCG plugins" in said and "-plugin: invalid option" in said


def fake(tmp_path, says, takes=""):
    """A QEMU that prints these words when a plugin is loaded, as the real one does for another API version."""
    text = f'case "$*" in *--version*) echo QEMU emulator version 99.1; exit;; *asks.so*) echo "{says}" >&2;; '
    text += f'*probe.so*) echo "{takes}" >&2;; esac; exit 1'
    return Emulator("qemu-system-aarch64", (str(script(tmp_path / "qemu", text)),))


def test_an_api_that_is_too_new(own_cache, tmp_path):
    new = fake(tmp_path, "supports only up to version 12", "supports only a minimum version of 9")
    with pytest.raises(library.NoProbe, match="QEMU 99.1 speaks version 12 of the plugin API, .* up to 7") as caught:
        library.obtain(new)
    assert "--qemu" in caught.value.remedy and "minimum version of 9" in caught.value.evidence


def test_an_api_that_is_newer_and_takes_ours(own_cache, tmp_path):
    newer = fake(tmp_path, "supports only up to version 12", library._LOADED)
    assert library.obtain(newer).exists()


def test_without_a_compiler(own_cache, monkeypatch):
    monkeypatch.setattr(library.shutil, "which", lambda program: None)
    with pytest.raises(library.NoProbe, match="gcc is not installed"):
        library._compile(1, own_cache / "probe.so")


# -- sources of packages ----------------------------------------------------------------------------------------------


@pytest.fixture
def configured(monkeypatch):
    """``configured("trixie")``: apt of this machine is set up for this release, its updates and security."""

    def release(name, parts=("updates", "security")):
        found = [apt.Archive("http://main", name)]
        found += [apt.Archive(f"http://{'main' if part == 'updates' else part}", f"{name}-{part}") for part in parts]
        monkeypatch.setattr(apt, "archives", lambda: found)

    return release


def test_the_updates_of_another_release_are_derived(configured):
    configured("trixie")
    full, plain = apt.source_lines("bookworm")
    assert plain == ["deb http://main bookworm main"]
    assert full == [*plain, "deb http://main bookworm-updates main", "deb http://security bookworm-security main"]


def test_backports_need_their_release(configured):
    configured("bookworm")
    full, plain = apt.source_lines("trixie-backports")
    assert plain == ["deb http://main trixie main", "deb http://main trixie-backports main"]
    assert full[2:] == ["deb http://main trixie-updates main", "deb http://security trixie-security main"]


def test_sid_has_no_updates(configured):
    configured("bookworm")
    assert apt.source_lines("sid") == [["deb http://main sid main"]]


def test_a_release_without_its_security_archive_is_said_so(configured, capsys):
    configured("bookworm", parts=())
    assert apt.source_lines("trixie") == [["deb http://main trixie main"]]
    assert "no updates or security archive configured: trixie is used without them" in capsys.readouterr().err


def test_an_archive_that_is_not_debians(tmp_path, monkeypatch):
    script(tmp_path / "apt-get", "echo 'Ubuntu|main|http://archive|noble'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(SetupError, match="no Debian archive configured, only Ubuntu") as caught:
        apt.archives()
    assert "sources.list" in caught.value.remedy


def test_updates_that_the_archive_has_removed_are_left_out(configured, tmp_path, monkeypatch, capsys):
    """The index of a release that is no longer supported still lists them."""
    configured("bookworm")
    monkeypatch.setattr(apt.PrivateApt, "_read", lambda self, lines: "")
    tried = []

    def download(self, packages, where):
        tried.append(packages)
        if packages == ["linux-2"]:
            raise NoArchive("404")
        return [where / "linux-1.deb"]

    monkeypatch.setattr(apt.PrivateApt, "_download", download)
    private = apt.PrivateApt(tmp_path, "arm64", "bullseye")
    newest = lambda apt: ["linux-2"] if len(apt._sets) > 1 else ["linux-1"]  # noqa: E731
    assert private.fetch(newest, tmp_path) == [tmp_path / "linux-1.deb"]
    assert tried == [["linux-2"], ["linux-1"]]
    assert "bullseye: the archive lacks updates that its index lists" in capsys.readouterr().err
    with pytest.raises(NoArchive, match="404"):
        private.fetch(lambda apt: ["linux-2"], tmp_path)
