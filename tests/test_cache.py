"""The cache: entries are made once, never half made; damage and full disks are detected."""

import multiprocessing
import os
import signal
import time

import pytest
from arm_kvm.support import cache
from arm_kvm.support.errors import DiskFull


def test_key_depends_on_every_input():
    keys = {cache.key_of(*inputs) for inputs in [("a", "b"), ("ab",), (b"a", b"b"), ("b", "a"), ({"a": 1},), ()]}
    assert len(keys) == 6


def test_made_once_then_found(own_cache):
    made = []

    def make(out, work):
        made.append(out)
        (out / "file").write_text("x")
        return {"label": "thing"}

    first, second = (cache.obtain("things", "key", make) for _ in range(2))
    assert first == second and len(made) == 1
    assert first.meta == {"label": "thing"} and (first.folder / "file").read_text() == "x"
    assert [entry.folder for entry in cache.entries("things")] == [first.folder]


def test_a_failed_entry_leaves_its_work_and_no_result(own_cache):
    def fail(out, work):
        (work / "half").write_text("h")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        cache.obtain("things", "key", fail)
    assert cache.lookup("things", "key") is None

    def resume(out, work):
        return {"found": (work / "half").read_text()}

    entry = cache.obtain("things", "key", resume)
    assert entry.meta == {"found": "h"}
    assert sorted(p.name for p in entry.folder.parent.iterdir()) == ["key", "key.lock"]


def _slow_maker(log):
    def make(out, work):
        with open(log, "a") as f:
            f.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        return {}

    cache.obtain("things", "key", make)


def test_two_processes_make_it_once(own_cache, tmp_path):
    log = tmp_path / "makers"
    both = [multiprocessing.get_context("fork").Process(target=_slow_maker, args=(log,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(20)
    assert [p.exitcode for p in both] == [0, 0] and len(log.read_text().splitlines()) == 1


def test_a_killed_maker_leaves_no_lock(own_cache, tmp_path):
    log = tmp_path / "makers"
    process = multiprocessing.get_context("fork").Process(target=_slow_maker, args=(log,))
    process.start()
    while not log.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert cache.lookup("things", "key") is None
    _slow_maker(log)
    assert cache.lookup("things", "key") is not None


def test_a_full_disk_has_a_message_of_its_own(own_cache):
    def make(out, work):
        with open("/dev/full", "w") as full:  # a real ENOSPC, without filling a disk
            full.write("x")

    with pytest.raises(DiskFull, match="is full") as caught:
        cache.obtain("things", "key", make)
    assert "ARM_KVM_CACHE" in caught.value.remedy


DAMAGE = {
    "an empty meta.json": lambda folder: (folder / "meta.json").write_text(""),
    "a file that was cut": lambda folder: (folder / "part/image").write_text("hal"),
    "a file that is gone": lambda folder: (folder / "part/image").unlink(),
    "an invalid sizes.json": lambda folder: (folder / "sizes.json").write_text("{"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_made_anew(own_cache, capsys, what):
    def make(out, work):
        (out / "part").mkdir()
        (out / "part/image").write_text("whole")
        return {"label": "thing"}

    entry = cache.obtain("things", "key", make)
    DAMAGE[what](entry.folder)
    assert cache.obtain("things", "key", make).meta == {"label": "thing"}
    assert (entry.folder / "part/image").read_text() == "whole"
    assert "is damaged" in capsys.readouterr().err
    assert cache.obtain("things", "key", make) == entry and not capsys.readouterr().err


def test_old_scratch_folders_are_removed(own_cache):
    cache.obtain("things", "key", lambda out, work: {})
    for name, age in (("old.work", 40 * 24 * 3600), ("new.work", 60)):
        (own_cache / "things" / name).mkdir()
        os.utime(own_cache / "things" / name, (time.time() - age,) * 2)
    cache.obtain("things", "other", lambda out, work: {})
    assert [entry.folder.name for entry in cache.leftovers("things")] == ["new.work"]


def test_scratch_folders_are_few(own_cache):
    """The newest four are kept, however many makers were interrupted."""
    cache.obtain("things", "key", lambda out, work: {})
    for age in range(7):
        (own_cache / f"things/n{age}.work").mkdir()
        os.utime(own_cache / f"things/n{age}.work", (time.time() - 60 * age,) * 2)
    cache.obtain("things", "other", lambda out, work: {})
    assert sorted(entry.folder.name for entry in cache.leftovers("things")) == [f"n{age}.work" for age in range(4)]


def test_what_interruptions_leave_is_no_entry(own_cache):
    """Scratch folders and partial entries are leftovers, unless a process is working on them."""
    cache.obtain("things", "key", lambda out, work: {})
    for name in ("a.work", "b.new", "key.gone-1"):
        (own_cache / "things" / name).mkdir()
        (own_cache / "things" / name / "meta.json").write_text("{}")

    def look(out, work):
        return {"left": sorted(entry.folder.name for entry in cache.leftovers("things"))}

    assert cache.obtain("things", "a", look).meta == {"left": ["b.new", "key.gone-1"]}
    assert {entry.folder.name for entry in cache.entries("things")} == {"key", "a"}
    for entry in cache.leftovers("things"):
        cache.remove(entry)
    assert cache.leftovers("things") == []
