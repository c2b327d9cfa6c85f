"""Snapshots: hosts are restored as they were saved, and a damaged snapshot is never used."""

import json
import os
import time
from dataclasses import replace

import numpy as np
import pytest
from arm_kvm.host import config, snapshots
from arm_kvm.host.kernel import obtain
from arm_kvm.hosts.pool import Pool
from arm_kvm.machine.saved import Saved, copy
from arm_kvm.oracle import Oracle
from arm_kvm.recorder.probe import Probe
from arm_kvm.support import cache
from arm_kvm.support.errors import QemuDied
from arm_kvm.support.paths import cache_root
from arm_kvm.vmm.client import op
from arm_kvm.vmm.memory import PAGE

ARM64, VHE = config.find("arm64"), config.find("arm64-vhe")
IPA = 0x8000_0000


@pytest.fixture(scope="module")
def kernel():
    return obtain(ARM64)


@pytest.fixture
def restore(kernel, tmp_path):
    """``restore()``: a host restored from the cached snapshot."""
    hosts = []

    def start(host_config=ARM64, **how):
        hosts.append(snapshots.obtain(host_config, kernel, tmp_path / "boot").restore(tmp_path / "logs", **how))
        return hosts[-1]

    yield start
    for host in hosts:
        host.shutdown()


def test_a_restored_host_is_a_host(restore):
    """Agent, ssh, clock, VMs and RAM as the lab reads it; the next host has no trace of it."""
    one = restore()
    assert abs(float(one.ssh.run("date +%s")) - time.time()) < 2.0
    one.ssh.run("echo here > /tmp/trace")
    vm = one.create_vm("A64")
    vm.add_memory(IPA, PAGE)
    vm.guest.write(IPA, 0xA57)
    assert Oracle(one).stage2(vm).leaf(IPA).pa == vm.frame_of(IPA)
    assert one.machine.ram.read(vm.frame_of(IPA), 2) == b"\x57\x0a"

    two = restore()
    assert two.ssh.run("ls /tmp/trace", check=False).endswith("No such file or directory\n")
    assert two.agent(op.hello) == one.agent(op.hello)


def test_two_at_once_do_not_share_memory(restore):
    hosts = {b"first": restore(), b"other": restore()}
    places = {}
    for content, host in hosts.items():
        places[content] = host.agent(op.memory_map, size=PAGE)
        host.agent(op.memory_write, hva=places[content], blob=content)
    assert len(set(places.values())) == 1, "two agents that know nothing of each other"
    assert all(host.agent(op.memory_read, hva=places[c], size=5) == c for c, host in hosts.items())


def test_memory_of_a_qemu_that_has_ended(restore):
    """Reading it raises an error: if it read as zeros, the judge would still give a verdict."""
    host = restore()
    ram, base = host.machine.ram, host.machine.ram.base
    assert ram.fetch(np.array([base], dtype=np.uint64)).size == 1
    host.machine.process.kill()
    host.machine.process.wait()
    with pytest.raises(QemuDied, match="RAM is gone"):
        ram.read(base, 8)
    with pytest.raises(QemuDied, match="RAM is gone"):
        ram.fetch(np.array([base], dtype=np.uint64))


def test_entropy_is_stirred_in(restore):
    """Sixteen bytes of /dev/urandom on hosts restored from one snapshot.

    Without entropy a 6.1 on an idle machine gave the same on 11 of 12 hosts; on a busy one others each time.
    """
    read = "head -c 16 /dev/urandom | od -An -tx1"
    first, second = (restore(entropy=os.urandom(64)).ssh.run(read) for _ in range(2))
    assert first != second


def test_a_sleeping_process_wakes_up(restore):
    """The timers of both CPUs run after a restore (those of a VHE kernel would not: arm64-vhe boots afresh)."""
    host = restore()
    host.ssh.run("taskset 1 sleep 0.3 & taskset 2 sleep 0.3 & wait", timeout=10.0)


def test_a_cpu_goes_and_comes_back(restore):
    """PSCI works, although this QEMU was given no kernel to boot."""
    host = restore()
    with host.offline(1):
        assert host.ssh.run("nproc") == "1\n"
    assert host.ssh.run("nproc") == "2\n"


def test_restored_with_the_probe(restore):
    """Its RAM is a full copy of its own, shared with the plugin."""
    host = restore(plugin=Probe(ARM64))
    vm = host.create_vm("A64")
    vm.guest.ping()
    assert Oracle(host).stage2(vm).leaf(0x0800_0000).executable


# -- not trusted -----------------------------------------------------------------------------------------------


@pytest.fixture
def own_snapshot(kernel, monkeypatch, tmp_path):
    """A cache that contains a copy of the snapshot and of what it was made from."""
    snapshots.obtain(ARM64, kernel, tmp_path / "boot")
    key, home = snapshots.key_of(ARM64, kernel), tmp_path / "cache"
    for kind in ("rootfs", "bytecode", "kernels"):
        (home / kind).parent.mkdir(exist_ok=True)
        (home / kind).symlink_to(cache_root() / kind)
    mine = home / snapshots.KIND / key
    mine.mkdir(parents=True)
    for path in (cache_root() / snapshots.KIND / key).iterdir():
        with path.open("rb") as source, (mine / path.name).open("wb") as target:
            copy(source.fileno(), target.fileno())
    monkeypatch.setenv("ARM_KVM_CACHE", str(home))
    return mine


def cut(path):
    os.truncate(path, 4096)


def flip(path):
    with path.open("r+b") as f:
        where = os.lseek(f.fileno(), 0, os.SEEK_DATA) + 5
        byte = os.pread(f.fileno(), 1, where)[0]
        os.pwrite(f.fileno(), bytes([byte ^ 1]), where)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("name", ["ram", "devices"])
@pytest.mark.parametrize("harm", [cut, flip, remove])
def test_a_damaged_one_is_made_anew(own_snapshot, kernel, tmp_path, harm, name, capfd):
    harm(own_snapshot / name)
    host = snapshots.obtain(ARM64, kernel, tmp_path / "boot").restore(tmp_path / "logs")
    try:
        assert host.agent(op.hello)["kvm"]
    finally:
        host.shutdown()
    assert "is damaged; it is made anew" in capfd.readouterr().err


def test_a_broken_description_is_damage(own_snapshot, kernel, tmp_path, capfd):
    (own_snapshot / "meta.json").write_text(json.dumps({"ram": "0"}))
    snapshots.obtain(ARM64, kernel, tmp_path / "boot")
    assert "is damaged" in capfd.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"cmdline": ARM64.cmdline + " quiet"},
        {"board": replace(ARM64.board, cpus=1)},
        {"board": replace(ARM64.board, cpu="cortex-a53")},
        {"board": replace(ARM64.board, memory=1 << 29)},
    ],
)
def test_another_host_has_another_key(kernel, change):
    assert snapshots.key_of(replace(ARM64, **change), kernel) != snapshots.key_of(ARM64, kernel)


def test_another_kernel_has_another_key(kernel, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(kernel.image.read_bytes() + b"\0")
    other = replace(kernel, image=image)
    less = replace(kernel, modules=kernel.modules[:-1])
    assert len({snapshots.key_of(ARM64, k) for k in (kernel, other, less)}) == 3


def test_another_root_file_system_has_another_key(kernel, monkeypatch):
    """A root file system that is made anew has other ssh keys, although its inputs are the same."""
    key, rootfs = snapshots.key_of(ARM64, kernel), snapshots.rootfs.obtain("arm64")
    monkeypatch.setattr(snapshots.rootfs, "obtain", lambda architecture: replace(rootfs, host_key="another"))
    assert snapshots.key_of(ARM64, kernel) != key


def test_what_sleeps_on_a_restored_vhe_host_wakes_up(restore):
    """QEMU does not restore the EL2 timer's deadline: the agent has every CPU program it anew."""
    for _ in range(3):
        host = restore(VHE)
        for cpu in range(VHE.board.cpus):
            assert host.ssh.run(f"taskset {1 << cpu:x} sh -c 'for i in 1 2 3; do sleep 0.05; done; echo up'") == "up\n"


def test_a_host_that_is_to_boot_afresh(kernel, tmp_path):
    host_config = replace(ARM64, boot_afresh="to see that it does")
    pool = Pool([host_config], {}, {}, tmp_path / "artifacts", "", entropy=False)
    try:
        assert "init" in pool.host("arm64").boot_states.reached
    finally:
        pool.close()


def test_those_used_longest_ago_go_first(own_cache):
    def make(size):
        return lambda out, work: (out / "file").write_bytes(os.urandom(size)) and {}

    for age, key in enumerate("abc"):
        entry = cache.obtain("things", key, make(1 << 20))
        os.utime(entry.folder / "meta.json", (age, age))
    cache.keep_within("things", 5 << 19)
    assert [entry.folder.name for entry in cache.entries("things")] == ["c", "b"]
    cache.keep_within("things", 0)
    assert [entry.folder.name for entry in cache.entries("things")] == ["c"], "the one in use"


def test_one_that_does_not_restore_is_made_anew(own_snapshot, tmp_path):
    """Its checksums match, but QEMU rejects it: this host boots, and the next is restored from a new snapshot."""
    made = (own_snapshot / "devices").read_bytes()
    (own_snapshot / "devices").write_bytes(made[: len(made) // 2])
    about = json.loads((own_snapshot / "meta.json").read_text())
    (own_snapshot / "meta.json").write_text(json.dumps(about | Saved.at(own_snapshot).checksums()))
    pool = Pool([ARM64], {}, {}, tmp_path / "artifacts", "", entropy=False)
    try:
        booted = pool.host("arm64")
        assert "init" in booted.boot_states.reached and booted.agent(op.hello)["kvm"]
        pool.discard("arm64")
        restored = pool.host("arm64")
        assert "init" not in restored.boot_states.reached and restored.agent(op.hello)["kvm"]
    finally:
        pool.close()
    assert (own_snapshot / "devices").stat().st_size > len(made) // 2
