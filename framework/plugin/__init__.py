"""The pytest front door.

options      --host, --kernel, --isolation, ...; kernels are had before the first test
selection    which case runs on which host, and who shares a host with whom
order        the slow ones first, and workers (pytest -n) that share what takes long to make
ahead        what the next tests begin with, made while this one runs
judgement    what is held against the model after each test
fixtures     what a test case is written with
mutation     --mutate: the catalogue of mutants against the cases
ending       --keep
"""

# An importer before what it imports would keep pytest from rewriting the assertions of the imported.

pytest_plugins = [
    "framework.plugin.selection",
    "framework.plugin.order",
    "framework.plugin.options",
    "framework.plugin.judgement",
    "framework.plugin.fixtures",
    "framework.plugin.mutation",
    "framework.plugin.ending",
]
