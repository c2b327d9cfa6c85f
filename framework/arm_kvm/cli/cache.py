"""``cache``, ``cache clean``: what the lab keeps on disk, and the memory of running machines."""

from __future__ import annotations

import argparse
import time

from arm_kvm.cli.arguments import Commands
from arm_kvm.cli.output import Table
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import cache_root


def add_commands(commands: Commands) -> None:
    about = "The cache and its size, and the memory of running machines."
    actions = commands.add_group("cache", "show and clean the cache", about, cmd_cache_list)
    clean = actions.add("clean", cmd_cache_clean, "remove snapshots, or other kinds of entries")
    clean.add_argument("kind", nargs="*", metavar="KIND", help="what `arm-kvm cache` lists (default: snapshots)")


def cmd_cache_list(args: argparse.Namespace) -> int:
    """Show what the cache holds and how much disk it takes, and the memory of running machines."""
    from arm_kvm.host import snapshots
    from arm_kvm.hosts import spares
    from arm_kvm.machine.rundir import live_machines, memory_of
    from arm_kvm.support import cache

    table, total = Table("kind", "entries", "MiB", "left over, MiB", "last used"), 0
    for kind in cache.kinds():
        entries, left = cache.entries(kind), cache.leftovers(kind)
        sizes = [sum(map(cache.size, some)) for some in (entries, left)]
        total += sum(sizes)
        times = [(entry.folder / "meta.json").stat().st_mtime for entry in entries[:1]]
        newest = "".join(time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) for seconds in times)
        table.add(kind, str(len(entries)), *(f"{size / 2**20:,.0f}" for size in sizes), newest)
    table.add("all", "", f"{total / 2**20:,.0f}", "", "")
    table.show()
    print(f"{cache_root()}; of snapshots, those used last are kept, up to {snapshots.BUDGET >> 20:,} MiB")
    memory = [memory_of(card) for card in live_machines()]
    bound = f"none is prepared with less than {spares.LEAST >> 20:,} MiB available on this machine"
    print(f"running machines: {len(memory)}, {sum(memory) / 2**20:,.0f} MiB of memory; {bound}")
    return 0


def cmd_cache_clean(args: argparse.Namespace) -> int:
    """Remove snapshots, or the kinds of entries that are named."""
    from arm_kvm.host import snapshots
    from arm_kvm.support import cache

    known = cache.kinds()
    if unknown := [kind for kind in args.kind if kind not in known]:
        raise ConfigError(f"the cache holds no {unknown[0]!r}; it holds: {', '.join(known) or 'nothing'}")
    for kind in args.kind or [snapshots.KIND]:
        entries = cache.entries(kind)
        gone = [*entries, *cache.leftovers(kind)]
        used = sum(map(cache.size, gone))
        for entry in gone:
            cache.remove(entry)
        print(f"{kind}: {len(entries)} entries, {used / 2**20:,.0f} MiB removed")
    return 0
