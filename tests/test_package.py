"""The package as it is installed: a wheel, in an environment without the checkout, used from an empty folder."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from arm_kvm.support.errors import ConfigError
from arm_kvm.support.paths import CONFIGS, ROOT, cache_root

from .conftest import outside_pytest

SOURCES = ("framework", "configs", "images", "testcases", "pyproject.toml", "README.md")
LITTER = ("__pycache__", "*.egg-info")
OWN = """
def test_mine(vm, stage2):
    vm.add_memory(0x80000000, 0x1000)
    vm.guest.write(0x80000000, 1)
    assert stage2(vm).leaf(0x80000000).writable
"""
CASE = "stage2/test_first_faults.py::test_write_fault_maps_the_page_writable[arm64-A64]"


def done(argv, folder):
    """Run a program that must succeed."""
    answer = subprocess.run([*map(str, argv)], cwd=folder, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer


def wheel_of(source, out):
    """Build the wheel of a folder with pip, with the setuptools of this environment."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out]
    done([sys.executable, "-m", "pip", "wheel", *options, "."], source)
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel):
    """The files of the package in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith("arm_kvm/")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the package's files as a clone has them, with links as links."""
    folder = tmp_path_factory.mktemp("source")
    left_out = [f"--exclude={pattern}" for pattern in LITTER]
    pack = subprocess.Popen(["tar", "-c", *left_out, *SOURCES], cwd=ROOT, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x"], cwd=folder, stdin=pack.stdout, check=True)
    assert pack.wait() == 0
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return wheel_of(source, tmp_path_factory.mktemp("wheel"))


class Installed:
    """A virtual environment with the wheel in it; the package's dependencies are linked from the test environment."""

    def __init__(self, home, wheel):
        done([sys.executable, "-m", "venv", "--without-pip", home], home.parent)
        self.programs = home / "bin"
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": home, "platbase": home}))
        for folder in {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}:
            for path in Path(folder).iterdir():
                if "arm_kvm" not in path.name:  # the editable install, and its entry points
                    (self.packages / path.name).symlink_to(path)
        options = ["--quiet", "--no-deps", "--no-index", wheel]
        done([sys.executable, "-m", "pip", "--python", self.programs / "python", "install", *options], home)

    def __call__(self, program, *arguments, folder):
        """Run a program of the environment; return its exit code and all it prints."""
        env = outside_pytest(os.environ)
        env.pop("PYTHONPATH", None)  # it may name a checkout
        how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        argv = [self.programs / program, *map(str, arguments)]
        answer = subprocess.run(argv, cwd=folder, env=env, timeout=120, **how)
        assert "Traceback" not in answer.stdout and "Warning" not in answer.stdout, answer.stdout
        return answer.returncode, answer.stdout

    def files(self):
        """The installed files, without compiled ones."""
        return {path for path in self.packages.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("installed") / "home", wheel)


@pytest.fixture
def run(installed, tmp_path):
    """``run("arm-kvm", "hosts")`` in an empty folder; no run may write to where the package is installed."""
    before = installed.files()
    yield lambda *argv: installed(*argv, folder=tmp_path)
    assert installed.files() == before


def test_the_wheel_has_every_file(source, wheel):
    """Those of the package, and those that the links in its ``_data`` lead to."""
    package = source / "framework/arm_kvm"
    files = {path: path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    for link in filter(Path.is_symlink, (package / "_data").iterdir()):
        target = link.resolve()
        files |= {path: Path("_data", link.name, path.relative_to(target)) for path in target.rglob("*")}
    expected = {f"arm_kvm/{name}": path.read_bytes() for path, name in files.items() if path.is_file()}
    assert {"arm_kvm/_data/images/init", "arm_kvm/recorder/probe.c", "arm_kvm/guest/a32.S"} <= set(expected)
    assert contents(wheel) == expected


def test_a_wheel_of_the_source_distribution_is_the_same(source, wheel, tmp_path):
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done([sys.executable, "-c", build], source)
    (archive,) = tmp_path.glob("*.tar.gz")
    (tmp_path / "source").mkdir()
    done(["tar", "-xf", archive], tmp_path / "source")
    (unpacked,) = (tmp_path / "source").iterdir()
    assert contents(wheel_of(unpacked, tmp_path)) == contents(wheel)


def test_hosts_are_listed(run):
    code, said = run("arm-kvm", "hosts")
    assert code == 0 and {path.stem for path in (CONFIGS / "hosts").iterdir()} <= set(said.split())


CHOSEN = {
    "no path": (["-k", "first_faults"], "testcases/stage2/test_first_faults.py::"),
    "a suite": (["stage2", "-k", "first_faults"], "testcases/stage2/test_first_faults.py::"),
    "an option's value that is also a suite's name": (["-k", "stage2", "vmid"], "no tests collected"),
    "a file": (["-x", "stage2/test_first_faults.py"], "testcases/stage2/test_first_faults.py::"),
    "as pytest prints it": (["testcases/" + CASE], "testcases/" + CASE),
    "the user's own": (["my_test.py"], "::test_mine[arm64-A64]"),
}


@pytest.mark.parametrize("what", CHOSEN)
def test_cases_are_chosen(run, tmp_path, what):
    (tmp_path / "my_test.py").write_text(OWN)
    arguments, words = CHOSEN[what]
    code, said = run("arm-kvm", "test", "--host", "arm64", "--collect-only", "-q", *arguments)
    assert code == (5 if "no tests" in words else 0) and words in said, said
    others = {line.partition("::")[0] for line in said.splitlines() if "::" in line} - {words.partition("::")[0]}
    assert not others


def test_a_path_that_does_not_exist(run):
    code, said = run("arm-kvm", "test", "--host", "arm64", "stage3")
    assert code == 4 and "stage3: there is no such file or folder, neither here nor among the suites" in said


def test_a_case_runs(run, tmp_path):
    """By its node id, in a worker. Its artifacts go to the current folder, pytest's cache to the lab's."""
    code, said = run("arm-kvm", "test", "--host", "arm64", "-n", "1", CASE)
    assert code == 0 and "1 passed" in said and "1 worker" in said
    assert list(tmp_path.glob("artifacts/stage2/*/stage2-*.txt"))
    assert {path.name for path in tmp_path.iterdir()} <= {"artifacts", ".benchmarks"}
    assert (cache_root() / "pytest/v").is_dir()


def test_a_case_of_ones_own(run, tmp_path):
    """With pytest itself, and with a host file of one's own, too."""
    (tmp_path / "my_test.py").write_text(OWN)
    (tmp_path / "mine.yaml").write_text((CONFIGS / "hosts/arm64.yaml").read_text())
    code, said = run("python", "-m", "pytest", "my_test.py", "--strict-markers", "--host", "./mine.yaml")
    assert code == 0 and "2 passed" in said and "mine: QEMU" in said, said


def test_the_marks_are_registered(run):
    """Also with the plugin named by -p, as PYTEST_DISABLE_PLUGIN_AUTOLOAD requires."""
    code, said = run("python", "-m", "pytest", "-p", "arm_kvm.pytest_plugin", "--markers")
    assert code == 0 and "@pytest.mark.isolation(scope): the case has its host for itself" in said


def test_a_mutant_is_killed(run):
    code, said = run("arm-kvm", "mutate", "--host", "arm64", "--only", "unmap-ignored", "--quick", "-n", "0")
    assert code == 0 and "arm64: 1 of 1 applicable mutants killed" in said, said


def test_benchmarks_need_a_checkout(run):
    code, said = run("arm-kvm", "bench")
    assert code == ConfigError.exit_code and "tox -e bench" in said


def test_the_checkout_has_the_same_options():
    checkout = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    installed = ConfigParser()
    installed.read(ROOT / "framework/arm_kvm/_data/pytest.ini")
    assert checkout["addopts"] == installed["pytest"]["addopts"]
