"""The command line front door: ``arm-kvm COMMAND``. Every error is one message and an exit code of its own."""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from arm_kvm.cli.terminal import attach
from arm_kvm.conform import departures
from arm_kvm.conform.run import Difference, conform
from arm_kvm.conform.silicon import Lab
from arm_kvm.events import checker, picture
from arm_kvm.events.trace import Enter, Invalidate, Trace
from arm_kvm.events.world import full
from arm_kvm.host import config, emulators, snapshots
from arm_kvm.host.host import Host
from arm_kvm.host.kernel import Kernel, obtain
from arm_kvm.host.kernel.sources import build_for
from arm_kvm.hosts import spares
from arm_kvm.machine.emulator import Emulator
from arm_kvm.machine.rundir import live_machines, memory_of, run_directory
from arm_kvm.model.kvm import notifier
from arm_kvm.oracle.oracle import Oracle
from arm_kvm.oracle.sight import watch
from arm_kvm.sequences import player as sequence_player
from arm_kvm.sequences import steps as sequence_steps
from arm_kvm.support import cache, interrupt, progress, setup
from arm_kvm.support.apt import main_archive
from arm_kvm.support.errors import (
    ConfigError,
    LabError,
    NoLiveMachine,
    NonConformance,
    ProtocolViolation,
    SequenceFailed,
    SetupError,
    TraceError,
)
from arm_kvm.support.limits import is_limit, refusals_told, told
from arm_kvm.support.paths import ROOT, cache_root, offline

_WIDE = 400  #: columns of a table that no terminal shows: nothing is folded
_out = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
_LEAST_DISK = 4 << 30
_LAST_PORT = 65535
_MUTATED = ("a15", "arm64")
_QEMU_HELP = "a program, the folder it was built in, or deb:SUITE (default: the host file's)"
_CONFORM_HOSTS = ("a15", "a15-wide", "arm64", "arm64-vhe")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def cmd_setup(args: argparse.Namespace) -> int:
    installed = setup.install()
    print(f"installed: {' '.join(installed)}" if installed else "all system packages are installed")
    return 0


def cmd_doctor(args: argparse.Namespace) -> int:
    """What this machine has and lacks; exit code 3 when something the tests need is missing."""
    table = _table("", "what", "for")
    for need in setup.NEEDS:
        table.add_row("ok" if need.met else "MISSING", need.program, f"{need.purpose} (package {need.package})")
    for program in config.PROGRAMS:
        table.add_row("", Emulator.installed(program).name, program)
    root = cache_root()
    with refusals_told(root):
        root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    table.add_row("ok" if free > _LEAST_DISK else "LOW", f"{free >> 30} GiB free", f"cache in {root}")
    try:
        main_archive()
        table.add_row("ok", "Debian archive", "configured in apt")
    except SetupError as e:
        table.add_row("MISSING", "Debian archive", e.one_line)
    table.add_row("", "offline" if offline() else "online", "ARM_KVM_OFFLINE")
    _out.print(table)
    if lacking := setup.missing():
        raise SetupError(f"missing packages: {' '.join(lacking)}", remedy="run `arm-kvm setup`")
    return 0


def cmd_hosts(args: argparse.Namespace) -> int:
    table = _table("host", "board", "kernel", "guests", "can")
    for name in config.host_names():
        host = config.find(name)
        keys = host.kernel
        kernel = " ".join(str(keys[k]) for k in ("package", "suite", "image", "path") if k in keys)
        kernel = kernel or Path(keys["url"]).name
        qemu = host.emulator or host.board.qemu.name
        board = f"{host.board.cpu} x{host.board.cpus}, {host.board.memory >> 20} MiB, {qemu}"
        table.add_row(name, board, f"{keys['source']}: {kernel}", " ".join(host.guests), " ".join(sorted(host.can)))
    _out.print(table)
    return 0


def cmd_kernel_list(args: argparse.Namespace) -> int:
    table = _table("kernel", "version", "size", "image")
    for entry in cache.entries("kernels"):
        if entry.damage():
            continue
        image, meta = entry.folder / "image", entry.meta
        label = meta["label"] + (f" [{' '.join(meta['fragments'])}]" if "fragments" in meta else "")
        table.add_row(label, meta["version"], f"{image.stat().st_size >> 20} MiB", str(image))
    _out.print(table if table.row_count else "no kernel is cached")
    return 0


def _show(kernel: Kernel) -> int:
    print(f"{kernel.name}\n{kernel.image}")
    return 0


def cmd_kernel_fetch(args: argparse.Namespace) -> int:
    return _show(obtain(config.find(args.host)))


def cmd_kernel_build(args: argparse.Namespace) -> int:
    return _show(build_for(config.find(args.host), args.tree, args.patch, args.fragment))


def cmd_boot(args: argparse.Namespace) -> int:
    """Boot a host and hand its console to the person at the terminal."""
    host_config = emulators.fitted(config.find(args.host), args.qemu)
    kernel = obtain(host_config, args.kernel)
    host = Host.boot(host_config, kernel, run_directory() / "logs", extra="armkvm.shell", ssh_port=args.ssh_port)
    try:
        seconds = host.boot_states.reached["agent"]
        qemu, kvm = host_config.board.qemu.name, "yes" if host.has_kvm else "no"
        print(f"{host_config.name}: {host.release} on {qemu}, up in {seconds:.1f} s, KVM: {kvm}")
        print(f"shell:  {host.ssh_command}\ntables: arm-kvm stage2 {host_config.name}")
        print("This is its console; Ctrl-] ends the machine.", flush=True)
        attach(host.machine.console.take_over(), lambda: host.machine.process.poll() is None)
        if host.machine.process.poll():  # 0: the person has powered it off
            raise host.machine.lost()
    finally:
        host.shutdown()
    return 0


def cmd_stage2(args: argparse.Namespace) -> int:
    """The stage-2 tables of the guests that run on a live machine, read from outside."""
    cards = [card for card in live_machines() if card.host == args.host]
    if not cards:
        raise NoLiveMachine(
            f"no machine of host {args.host!r} is running",
            remedy=f"start one with `arm-kvm boot {args.host}`, or keep one with pytest --keep",
        )
    tables = watch(cards[-1], args.seconds)
    for stage2 in tables:
        print(stage2.dump())
    if not tables:
        print(f"no guest was seen inside any CPU of {args.host} in {args.seconds:.0f} s")
    return 0


def cmd_conform(args: argparse.Namespace) -> int:
    """The model against the emulated CPU; no kernel is involved."""
    if args.departures:
        print("\n".join(map(str, departures.ALL)))
        return 0
    for name in args.host or _CONFORM_HOSTS:
        _conform(name, args.qemu, args.cases, secrets.randbits(32) if args.seed is None else args.seed)
    return 0


def _conform(name: str, qemu: str | None, cases: int, seed: int) -> None:
    host = emulators.fitted(config.find(name), qemu)
    words = ["arm-kvm", "conform", "--host", name, *(["--qemu", qemu] if qemu else [])]
    again = shlex.join([*words, "--cases", str(cases), "--seed", str(seed)])
    started = time.monotonic()
    with Lab(host, run_directory() / "logs") as lab, progress.task(again, cases, "cases") as advance:
        try:
            tally = conform(lab, cases, seed, advance)
        except Difference as e:
            raise NonConformance(
                f"{host.name}: model and silicon differ", remedy=f"repeat it with `{again}`", evidence=str(e)
            ) from e
    minutes = (time.monotonic() - started) / 60
    print(f"{again}\n{host.board.qemu.name}: {tally}")
    print(f"no unexplained difference; {tally.cases / minutes:,.0f} cases a minute", flush=True)


def cmd_trace_check(args: argparse.Namespace) -> int:
    """Recorded traces against the rules of VMIDs and TLB maintenance: every file is judged before the verdict."""
    broken = [str(file) for file in args.file if not _keeps_the_rules(file)]
    if broken:
        raise ProtocolViolation(
            f"{len(broken)} of {len(args.file)} traces break the rules of VMIDs and TLB maintenance: {' '.join(broken)}"
        )
    return 0


def _keeps_the_rules(file: Path) -> bool:
    trace = Trace.load(file)
    if not trace.events:
        raise TraceError(f"{file} has no event in it: there is nothing to check")
    found = checker.violations(trace)
    entries = len(list(trace.of(Enter)))
    rollovers = sum(full(event.op) for event in trace.of(Invalidate))
    verdict = f"{len(found)} violations" if found else "the rules are kept"
    print(f"{file}: {len(trace.events)} events, {entries} guest entries, {rollovers} rollovers: {verdict}")
    for violation in found:
        print(violation)
    return not found


def cmd_trace_draw(args: argparse.Namespace) -> int:
    """A recorded trace as a picture, beside it or where -o says."""
    drawing = picture.draw(Trace.load(args.file))
    output = args.output or args.file.with_suffix(".svg")
    if output.resolve() == args.file.resolve():
        raise SetupError(f"the picture would overwrite the trace {output}", remedy="name another file with -o")
    try:
        output.write_text(drawing, encoding="utf-8")
    except OSError as e:
        raise SetupError(f"cannot write the picture {output}: {e.strerror}", remedy="name another file with -o") from e
    print(output)
    return 0


def cmd_replay(args: argparse.Namespace) -> int:
    """A saved sequence on a fresh host, step by step."""
    steps = sequence_steps.load(args.file)
    host_config = emulators.fitted(config.find(args.host), args.qemu)
    host = Host.boot(host_config, obtain(host_config, args.kernel), run_directory() / "logs")
    try:
        host.require_kvm()
        done = 0
        for step in sequence_player.play(host, Oracle(host), host_config.guests[0], steps):
            done += 1
            print(f"{done:3}  {step}", flush=True)
    except sequence_player.SequenceBroken as e:
        if e.lost:
            raise e.lost from e
        raise SequenceFailed(f"{host.release} is not as the models say", evidence=str(e)) from e
    except ValueError as e:
        raise SetupError(f"{args.file}: {e}", remedy="correct the sequence") from e
    finally:
        host.shutdown()
    left_out = f" ({len(steps) - done} left out: this kernel cannot age pages)" if done < len(steps) else ""
    where = f"{host_config.name}, {host.release}, {host_config.board.qemu.name}"
    print(f"{done} steps on {where}: as the models say{left_out}")
    return 0


def cmd_obligations(args: argparse.Namespace) -> int:
    """The notifier model as a table: docs/notifiers.md is what this prints."""
    print(notifier.document(), end="")
    return 0


def cmd_cache_list(args: argparse.Namespace) -> int:
    """What the cache holds and how much disk it takes; and the memory of the machines that run."""
    table, total = _table("kind", "entries", "MiB", "left over, MiB", "last used"), 0
    for kind in cache.kinds():
        entries, left = cache.entries(kind), cache.leftovers(kind)
        sizes = [sum(map(cache.size, some)) for some in (entries, left)]
        total += sum(sizes)
        times = [(entry.folder / "meta.json").stat().st_mtime for entry in entries[:1]]
        newest = "".join(time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) for seconds in times)
        table.add_row(kind, str(len(entries)), *(f"{size / 2**20:,.0f}" for size in sizes), newest)
    table.add_row("all", "", f"{total / 2**20:,.0f}", "", "")
    _out.print(table)
    print(f"{cache_root()}; snapshots are kept within {snapshots.BUDGET >> 20:,} MiB, those used last")
    memory = [memory_of(card) for card in live_machines()]
    bound = f"none is started ahead with less than {spares.LEAST >> 20:,} MiB left on this machine"
    print(f"machines that run: {len(memory)}, {sum(memory) / 2**20:,.0f} MiB of memory; {bound}")
    return 0


def cmd_cache_clean(args: argparse.Namespace) -> int:
    """Remove what can be made again: snapshots, or the kinds that are named."""
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


def cmd_mutate(args: argparse.Namespace) -> int:
    """The suite against the catalogue of mutants: pytest, which prints the score."""
    wanted = [word for name in args.only or ["all"] for word in ("--mutate", name)]
    hosts = [word for name in args.host or _MUTATED for word in ("--host", name)]
    kernels = [word for kernel in args.kernel for word in ("--kernel", kernel)]
    qemus = [word for qemu in args.qemu for word in ("--qemu", qemu)]
    how = ["-q", "--tb=no", "-r", "", "-n", str(args.workers), *(["--quick"] if args.quick else [])]
    return _pytest(ROOT / "testcases", *how, *wanted, *hosts, *kernels, *qemus)


def cmd_bench(args: argparse.Namespace) -> int:
    """The benchmarks, as one table with medians and spread."""
    with tempfile.TemporaryDirectory(prefix="arm-kvm-bench-") as folder:
        saved = Path(folder) / "bench.json"
        began = os.getloadavg()[0]
        code = _pytest(ROOT / "benchmarks", "-v", "--benchmark-quiet", f"--benchmark-json={saved}", *args.pytest)
        if not saved.exists() or not saved.stat().st_size:
            print("arm-kvm: no benchmark was run", file=sys.stderr)
            return code
        results = json.loads(saved.read_text())["benchmarks"]
    table = _table("benchmark", "median", "quartiles apart", "least", "most", "rounds", "")
    for result in results:
        stats, more = result["stats"], ", ".join(f"{k} {v}" for k, v in result["extra_info"].items())
        times = (_seconds(stats[key]) for key in ("median", "iqr", "min", "max"))
        table.add_row(escape(result["name"].removeprefix("test_")), *times, str(stats["rounds"]), more)
    _out.print(table)
    print(f"{os.cpu_count()} CPUs; load {began:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended")
    return code


def _seconds(value: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def _pytest(where: Path, *arguments: str) -> int:
    """Run pytest on a folder of this checkout, from where the user is; its exit code."""
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), str(where)]
    process, interrupted = subprocess.Popen([sys.executable, "-m", "pytest", *settings, *arguments]), False
    while True:
        try:
            code = process.wait()
            return 130 if interrupted else code
        except KeyboardInterrupt:  # pytest has heard it, too, and writes down what it has
            interrupted = True


def _number(what: str, least: float, most: float = math.inf, kind: type = int) -> Callable[[str], float]:
    """A type of argument: numbers from ``least`` to ``most``; ``what`` says so to whoever gives another."""

    def number(text: str) -> float:
        with suppress(ValueError):
            if text.isascii() and least <= (value := kind(text)) <= most:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")

    return number


_POSITIVE = _number("a number above 0", 1)
_WORKERS = _number("a number of workers, 0 or more", 0)
_PORT = _number(f"a port from 0 to {_LAST_PORT}", 0, _LAST_PORT)
_SEED = _number("a seed from 0 to 4294967295", 0, 2**32 - 1)
_SECONDS = _number("a number of seconds above 0, up to 3600", 1e-3, 3600, float)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arm-kvm", description="A test lab for KVM/ARM, judged from outside the machine."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run, text: str, into=commands) -> argparse.ArgumentParser:
        sub = into.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    command("setup", cmd_setup, "install the system packages the lab needs (root), or print the line to run")
    command("doctor", cmd_doctor, "say what this machine has and lacks")
    command("hosts", cmd_hosts, "list the hosts of configs/hosts")
    kernel = commands.add_parser("kernel", help="list, fetch and build kernels", description="Kernels and their cache.")
    actions = kernel.add_subparsers(metavar="ACTION", required=True)
    command("list", cmd_kernel_list, "list the cached kernels", actions)
    command("fetch", cmd_kernel_fetch, "fetch (and build) the kernel a host file names", actions).add_argument("host")
    build = command("build", cmd_kernel_build, "build a source tree for a host, into the cache", actions)
    build.add_argument("host")
    build.add_argument("--tree", type=Path, required=True, metavar="DIR", help="a clean kernel source tree")
    build.add_argument("--patch", type=Path, action="append", default=[], metavar="FILE", help="apply it (repeatable)")
    build.add_argument("--fragment", action="append", default=[], help="one more of images/kernel (repeatable)")
    boot = command("boot", cmd_boot, "boot a host: its console here, its ssh line printed")
    boot.add_argument("host")
    boot.add_argument("--kernel", metavar="KERNEL", help="an image, a source tree, or deb:PACKAGE@SUITE")
    boot.add_argument("--qemu", metavar="QEMU", help=_QEMU_HELP)
    boot.add_argument(
        "--ssh-port", type=_PORT, default=0, metavar="PORT", help="port on loopback for ssh (default: a free one)"
    )
    stage2 = command("stage2", cmd_stage2, "show the live stage-2 tables of what runs on a host")
    stage2.add_argument("host")
    stage2.add_argument(
        "--seconds", type=_SECONDS, default=2.0, help="how long to watch the CPUs for guests (default: 2)"
    )
    conformance = command("conform", cmd_conform, "hold the model against the emulated CPU, on random tables")
    conformance.add_argument("--host", action="append", metavar="BOARD", help="a host's board (default: all four)")
    conformance.add_argument(
        "--cases", type=_POSITIVE, default=100_000, metavar="N", help="at least so many (default: 100000)"
    )
    conformance.add_argument("--qemu", metavar="QEMU", help=_QEMU_HELP)
    conformance.add_argument("--seed", type=_SEED, metavar="S", help="repeat this run (default: a new one)")
    conformance.add_argument("--departures", action="store_true", help="list where QEMU is known to leave the manual")
    replay = command("replay", cmd_replay, "play a saved sequence of steps, judged after each")
    replay.add_argument("file", type=Path, metavar="FILE")
    replay.add_argument("--host", default="arm64", metavar="HOST", help="where (default: arm64)")
    replay.add_argument("--kernel", metavar="KERNEL", help="an image, a source tree, or deb:PACKAGE@SUITE")
    replay.add_argument("--qemu", metavar="QEMU", help=_QEMU_HELP)
    command("obligations", cmd_obligations, "what each memory operation of the host owes to stage 2, as Markdown")
    mutate = command("mutate", cmd_mutate, "break the kernel on purpose, again and again: does the suite notice?")
    mutate.add_argument("--host", action="append", metavar="HOST", help=f"where (default: {' and '.join(_MUTATED)})")
    mutate.add_argument("--only", action="append", metavar="NAME", help="this mutant of configs/mutants (repeatable)")
    mutate.add_argument("--quick", action="store_true", help="run only the cases where the catalogue says to look")
    mutate.add_argument("--kernel", action="append", default=[], metavar="[HOST=]KERNEL", help="as pytest takes it")
    mutate.add_argument("--qemu", action="append", default=[], metavar="[HOST=]QEMU", help="as pytest takes it")
    mutate.add_argument(
        "--workers",
        "-n",
        type=_WORKERS,
        default=os.cpu_count() or 1,
        metavar="N",
        help="how many at once (default: CPUs)",
    )
    bench = command("bench", cmd_bench, "run the benchmarks, and print them as one table")
    bench.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="for pytest: -k restore, for example")
    store = commands.add_parser(
        "cache",
        help="show and clean the cache",
        description="The cache and its size, and the memory of machines that run.",
    )
    store.set_defaults(run=cmd_cache_list)
    actions = store.add_subparsers(metavar="ACTION")
    clean = command("clean", cmd_cache_clean, "remove snapshots, or other kinds of entries", actions)
    clean.add_argument("kind", nargs="*", metavar="KIND", help="what `arm-kvm cache` lists (default: snapshots)")
    trace = commands.add_parser(
        "trace", help="check and draw recorded traces", description="Recorded traces of events."
    )
    actions = trace.add_subparsers(metavar="ACTION", required=True)
    check = command("check", cmd_trace_check, "hold traces against the rules of VMIDs and TLB maintenance", actions)
    check.add_argument("file", type=Path, nargs="+", metavar="FILE")
    draw = command("draw", cmd_trace_draw, "draw VMs over time, their VMIDs, rollovers and invalidations", actions)
    draw.add_argument("file", type=Path, metavar="FILE")
    draw.add_argument("-o", "--output", type=Path, metavar="OUT.svg", help="default: FILE with the suffix .svg")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command that the arguments name; its exit code. Raises KeyboardInterrupt."""
    args = _parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except LabError as e:
        return _failed(e)
    except BrokenPipeError:  # `arm-kvm ... | head`
        _drop(1)
        return 0
    except (OSError, MemoryError, RuntimeError) as e:
        if not isinstance(e, OSError) and not is_limit(e):
            raise
        code = _failed(told(e, _output()))
        _drop(1)
        return code


def _failed(error: LabError) -> int:
    if interrupt.heard():  # and this is what became of it
        return error.exit_code
    try:
        print(f"arm-kvm: {error}", file=sys.stderr, flush=True)
    except OSError:
        _drop(2)
    return error.exit_code


def _drop(fd: int) -> None:
    """What is still to be written to this stream goes nowhere: the interpreter would fail over it at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _output() -> Path | None:
    """What standard output goes to, where it has a name."""
    with suppress(OSError):
        path = Path(os.readlink("/proc/self/fd/1"))
        return path if path.exists() else None
    return None
