"""A catalogue and mutants for tests, and the text of a running kernel."""

from arm_kvm.host import config
from arm_kvm.mutants.catalogue import Mutant
from arm_kvm.mutants.fingerprint import fingerprint
from arm_kvm.recorder.facts import kernel_map

ARM64 = config.find("arm64")


GOOD = """
one:
  fault: it is broken
  origin: somewhere
  return: [kvm_unmap_gfn_range]
  value: 0
  look: [test_suite.py]
"""


def mutant(**how):
    return Mutant("m", "area", "fault", "origin", (), frozenset(), **how)


def words_at(host, name, count):
    """The first instruction words of a function."""
    start = kernel_map(host).body(name).start
    raw = host.machine.ram.read(start, 4 * count)
    return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]


def sum_of(host, name):
    body = kernel_map(host).body(name)
    return fingerprint("armv8", host.machine.ram.read(body.start, 4 * len(body)))
