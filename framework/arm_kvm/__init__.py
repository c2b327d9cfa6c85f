"""arm-kvm: a test lab for KVM/ARM that judges the kernel from outside the machine.

A room imports only the rooms below it, which ``lint-imports`` (pyproject.toml) checks::

    cli, pytest_plugin                       the command line, and the plugin for pytest
    vocabulary, testing                      what test cases are written with
    hosts, mutants, sequences, conform       the hosts of a run; tests of the suite; random tests of kernel and model
    recorder                                 records VTTBR writes, TLB invalidations and guest entries in a trace
    oracle, events                           check stage-2 tables, and traces, against the model
    host                                     a Linux with KVM: kernel, root file system, boot, snapshots
    vmm                                      its VMM: the agent's client, memory, VMs, vCPUs, VGIC
    machine, guest, agent                    the board; the payload in a VM; the program inside the host
    model, support                           the rules of stage 2, VMIDs and notifiers; errors, cache, programs

``agent`` is copied into the host's root file system and uses only the standard library.
"""
