"""The pytest front end.

interrupts   Ctrl-C, from the moment pytest is loaded
markers      the marks of test cases
options      --host, --kernel, --isolation, ...; kernels are fetched and built before the first test
selection    which case runs on which host, and which cases share one
order        the slow cases first, and workers (pytest -n) that share what takes long to make
prepare      hosts and VMs for the next tests, made while this one runs
session      what the lab holds of one test
judgement    the host compared with the model after each test
failures     failures that the plugin itself raises
artifacts    the folder of each test
fixtures     what test cases are written with
mutation     --mutate: the cases against the catalogue of mutants
ending       --keep, and runs that judged nothing
limits       limits of this machine, such as a full disk
suites       for `arm-kvm test` only: the paths it takes
stash        what these parts leave for each other
"""

from arm_kvm.support import interrupt

interrupt.leave_when_heard(2)  # Ctrl-C while the rest is being imported: no traceback

# A module comes before those that import it: pytest cannot rewrite the assertions of one that is imported already.
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
