"""``test``, ``mutate``, ``bench``: run pytest on the suites, on the mutants, on the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from arm_kvm.cli.arguments import WORKERS, Commands
from arm_kvm.cli.output import Table, seconds
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import ROOT, TESTCASES, cache_root

_MUTATED = ("a15", "arm64")
#: pytest's configuration, always named: pytest would look for one in the user's current folder.
_CHECKOUT, _INSTALLED = ROOT / "pyproject.toml", ROOT / "pytest.ini"
_EXAMPLES = """\
All arguments are passed to pytest. Paths and node ids may be relative to this folder or to the suites; without any,
all suites are run. There is a worker for each CPU, unless -n says otherwise. For example:

  arm-kvm test --host arm64 -k first_faults
  arm-kvm test --host ./mine.yaml stage2/test_mmio.py
  arm-kvm test -- --help                                every option, including the lab's own
"""


def add_commands(commands: Commands) -> None:
    test = commands.add_raw("test", cmd_test, "run the suites that judge a kernel, with pytest", epilog=_EXAMPLES)
    test.add_argument("pytest", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="for pytest")
    mutate = commands.add("mutate", cmd_mutate, "break the kernel on purpose, again and again: does the suite notice?")
    hosts = f"break this host's kernel (repeatable; default: {' and '.join(_MUTATED)})"
    mutate.add_argument("--host", action="append", metavar="HOST", help=hosts)
    only = "use this mutant of configs/mutants (repeatable; default: all)"
    mutate.add_argument("--only", action="append", metavar="NAME", help=only)
    mutate.add_argument("--quick", action="store_true", help="run only the cases where the catalogue says to look")
    mutate.add_argument("--kernel", action="append", default=[], metavar="[HOST=]KERNEL", help="see pytest's --kernel")
    mutate.add_argument("--qemu", action="append", default=[], metavar="[HOST=]QEMU", help="see pytest's --qemu")
    workers = "try this many mutants at once (default: one for each CPU)"
    mutate.add_argument("--workers", "-n", type=WORKERS, default=os.cpu_count() or 1, metavar="N", help=workers)
    bench = commands.add("bench", cmd_bench, "run the benchmarks and print their figures as one table")
    bench.add_argument("pytest", nargs="*", metavar="-- ARGUMENT", help="for pytest: -k restore, for example")


def cmd_test(args: argparse.Namespace) -> int:
    """Run the suites. Paths are resolved in the plugin, since only pytest knows paths from values of options."""
    if args.pytest in (["--help"], ["-h"]):
        args.parser.print_help()
        return 0
    own = args.pytest[args.pytest[:1] == ["--"] :]
    return _pytest(TESTCASES, "-p", "arm_kvm.pytest_plugin.suites", "-n", "auto", *own)


def cmd_mutate(args: argparse.Namespace) -> int:
    """Run the suites against the catalogue of mutants, with the plugin's --mutate, which prints the score."""
    wanted = [word for name in args.only or ["all"] for word in ("--mutate", name)]
    hosts = [word for name in args.host or _MUTATED for word in ("--host", name)]
    kernels = [word for kernel in args.kernel for word in ("--kernel", kernel)]
    qemus = [word for qemu in args.qemu for word in ("--qemu", qemu)]
    how = ["-q", "--tb=no", "-r", "", "-n", str(args.workers), *(["--quick"] if args.quick else [])]
    return _pytest(TESTCASES, *how, *wanted, *hosts, *kernels, *qemus)


def cmd_bench(args: argparse.Namespace) -> int:
    """Run the benchmarks, and print one table with medians and spread."""
    benchmarks = ROOT / "benchmarks"
    if not benchmarks.is_dir():
        raise ConfigError(
            "the benchmarks are not part of the installed package", remedy="run `tox -e bench` in a checkout of arm-kvm"
        )
    with tempfile.TemporaryDirectory(prefix="arm-kvm-bench-") as folder:
        saved = Path(folder) / "bench.json"
        began = os.getloadavg()[0]
        code = _pytest(benchmarks, "-v", "--benchmark-quiet", f"--benchmark-json={saved}", *args.pytest)
        if not saved.exists() or not saved.stat().st_size:
            print("arm-kvm: no benchmark was run", file=sys.stderr)
            return code
        results = json.loads(saved.read_text())["benchmarks"]
    table = Table("benchmark", "median", "IQR", "min", "max", "rounds", "")
    for result in results:
        stats, more = result["stats"], ", ".join(f"{k} {v}" for k, v in result["extra_info"].items())
        times = (seconds(stats[key]) for key in ("median", "iqr", "min", "max"))
        table.add(result["name"].removeprefix("test_"), *times, str(stats["rounds"]), more)
    table.show()
    print(f"{os.cpu_count()} CPUs; load {began:.1f} when it began, {os.getloadavg()[0]:.1f} when it ended")
    return code


def _settings() -> list[str]:
    if _CHECKOUT.is_file():
        return ["-c", str(_CHECKOUT), "--rootdir", str(ROOT)]
    # By default pytest keeps its cache beside its configuration, which is in site-packages here.
    return ["-c", str(_INSTALLED), "--rootdir", str(ROOT), "-o", f"cache_dir={cache_root() / 'pytest'}"]


def _pytest(where: Path, *arguments: str) -> int:
    """Run pytest on a folder of the lab, from the user's current folder, and return its exit code."""
    argv = [sys.executable, "-m", "pytest", *_settings(), str(where), *arguments]
    process, interrupted = subprocess.Popen(argv), False
    while True:
        try:
            code = process.wait()
            return 130 if interrupted else code
        except KeyboardInterrupt:  # pytest receives it as well, and reports what it has so far
            interrupted = True
