"""The pytest front door.

interrupts   Ctrl-C, from now on
markers      the marks of test cases
options      --host, --kernel, --isolation, ...; kernels are had before the first test
selection    which case runs on which host, and who shares a host with whom
order        the slow ones first, and workers (pytest -n) that share what takes long to make
prepare      what the next tests begin with, made while this one runs
judgement    what is held against the model after each test
failures     what the plugin itself fails a test with
fixtures     what a test case is written with
mutation     --mutate: the catalogue of mutants against the cases
ending       --keep
limits       what this machine refuses a run
suites       `arm-kvm test` only: which of the lab's own cases
"""

from arm_kvm.support import interrupt

interrupt.leave_when_heard(2)  # no traceback of what is being loaded just now

# An importer before what it imports would keep pytest from rewriting the assertions of the imported.

pytest_plugins = [
    "arm_kvm.pytest_plugin.interrupts",
    "arm_kvm.pytest_plugin.markers",
    "arm_kvm.pytest_plugin.selection",
    "arm_kvm.pytest_plugin.order",
    "arm_kvm.pytest_plugin.options",
    "arm_kvm.pytest_plugin.judgement",
    "arm_kvm.pytest_plugin.fixtures",
    "arm_kvm.pytest_plugin.mutation",
    "arm_kvm.pytest_plugin.ending",
    "arm_kvm.pytest_plugin.limits",
]
