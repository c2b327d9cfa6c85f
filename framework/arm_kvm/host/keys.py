"""The keys of a host file (``configs/hosts/*.yaml``) and their meanings; ``config.py`` accepts no others."""

from __future__ import annotations

#: Top level.
TOP = {
    "board": "the emulated board, a mapping",
    "kernel": "where the host's kernel comes from, a mapping",
    "rootfs": "the root file system, and with it the architecture: `armhf` or `arm64`",
    "cmdline": "the kernel's command line; the lab appends words of its own",
    "can": "what the host can do, a list of capabilities",
    "guests": "the instruction sets of its guests: `A32`, `A64`; required of a host that can `kvm`",
    "timeouts": "seconds that a boot may take to reach each state, a mapping",
    "emulator": "where QEMU comes from, as `--qemu` takes it; a path is relative to the host file",
    "boot_afresh": "why this host is booted every time and never restored from a snapshot",
}

#: Of ``board``; all are required.
BOARD = {
    "qemu": "the program: `qemu-system-arm` or `qemu-system-aarch64`, which has the 32-bit boards as well",
    "machine": "QEMU's `-machine`; a host that can `kvm` needs `virtualization=on`",
    "cpu": "QEMU's `-cpu`",
    "cpus": "the number of CPUs, 1 to 64; a GICv2 serves 8",
    "memory": "the size of RAM, such as `512M` or `1G`: 128M to 64G in steps of 2M",
}

#: Of ``kernel``, by its ``source``.
KERNEL = {
    "file": {"image": "an image (zImage or Image); a path is relative to the host file"},
    "deb": {
        "package": "the Debian package",
        "suite": "the Debian suite it comes from; backports and sid as well",
        "modules": "the modules that are packed and loaded, with what they need; one that ends in `?` may be missing",
    },
    "tarball": {
        "url": "where a release tarball is downloaded from; either this or `path`",
        "path": "a release tarball on this machine, relative to the host file",
        "sha256": "the checksum of the tarball",
        "fragments": "the configuration, names of `images/kernel/*.config`",
    },
    "tree": {
        "path": "a clean kernel source tree, relative to the host file",
        "patches": "patches that are applied to a copy of it, relative to the host file",
        "fragments": "the configuration, names of `images/kernel/*.config`",
    },
}

#: Of ``kernel``, by its ``source``: those that must be there.
KERNEL_REQUIRED = {
    "file": ("image",),
    "deb": ("package", "suite"),
    "tarball": ("sha256", "fragments"),
    "tree": ("path", "fragments"),
}

#: Of ``can``: what a case may ask for with the mark ``needs``.
CAPABILITIES = {
    "kvm": "the host has KVM",
    "a15": "the 32-bit board of the Cortex-A15",
    "arm64": "a 64-bit board",
    "vmid8": "VMIDs have 8 bits",
    "vmid16": "VMIDs have 16 bits",
    "hotplug": "CPUs can be taken offline and brought back",
    "idle-tracking": "the kernel has idle page tracking",
    "fail-nth": "allocations can be made to fail through /proc/PID/fail-nth",
    "memory-failure": "the kernel has memory failure handling (MADV_HWPOISON)",
    "debug": "the kernel checks itself: lockdep, sleeping in atomic context, poisoning",
}

#: Of ``timeouts``: the boot states (``boot.py``) and ssh, and the seconds that each may take by default.
TIMEOUTS = {"kernel": 10.0, "init": 30.0, "network": 20.0, "ssh": 20.0, "agent": 20.0}
