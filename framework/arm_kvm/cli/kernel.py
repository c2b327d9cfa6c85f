"""``kernel list``, ``kernel fetch``, ``kernel build``: kernels and their cache."""

from __future__ import annotations

import argparse
from pathlib import Path

from arm_kvm.cli.arguments import Commands
from arm_kvm.cli.output import Table


def add_commands(commands: Commands) -> None:
    actions = commands.add_group("kernel", "list, fetch and build kernels", "Kernels and their cache.")
    actions.add("list", cmd_kernel_list, "list the cached kernels")
    actions.add("fetch", cmd_kernel_fetch, "fetch (and build) the kernel that a host file names").add_argument("host")
    build = actions.add("build", cmd_kernel_build, "build a source tree for a host, into the cache")
    build.add_argument("host")
    build.add_argument("--tree", type=Path, required=True, metavar="DIR", help="a clean kernel source tree")
    build.add_argument("--patch", type=Path, action="append", default=[], metavar="FILE", help="apply it (repeatable)")
    fragment = "a configuration fragment of images/kernel to add (repeatable)"
    build.add_argument("--fragment", action="append", default=[], help=fragment)


def cmd_kernel_list(args: argparse.Namespace) -> int:
    from arm_kvm.support import cache

    table = Table("kernel", "version", "size", "image")
    for entry in cache.entries("kernels"):
        if entry.damage():
            continue
        image, meta = entry.folder / "image", entry.meta
        label = meta["label"] + (f" [{' '.join(meta['fragments'])}]" if "fragments" in meta else "")
        table.add(label, meta["version"], f"{image.stat().st_size >> 20} MiB", str(image))
    if table:
        table.show()
    else:
        print("no kernel is cached")
    return 0


def cmd_kernel_fetch(args: argparse.Namespace) -> int:
    from arm_kvm.host import config
    from arm_kvm.host.kernel import obtain

    kernel = obtain(config.find(args.host))
    print(f"{kernel.name}\n{kernel.image}")
    return 0


def cmd_kernel_build(args: argparse.Namespace) -> int:
    from arm_kvm.host import config
    from arm_kvm.host.kernel.sources import build_for

    kernel = build_for(config.find(args.host), args.tree, args.patch, args.fragment)
    print(f"{kernel.name}\n{kernel.image}")
    return 0
