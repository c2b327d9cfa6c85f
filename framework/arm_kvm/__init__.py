"""arm-kvm: a test lab for KVM/ARM whose judge stands outside the machine.

A room imports rooms below it only (``lint-imports``, in pyproject.toml, checks that)::

    cli, pytest_plugin                       the front doors: the command line's, and pytest's
    vocabulary, testing                      what test cases are written with
    hosts, mutants, sequences, conform       the hosts of a run; the suite tested; the kernel and the model at random
    recorder                                 sees VTTBR writes, invalidations and guest entries, and makes a trace
    oracle, events                           hold stage-2 tables, and traces, against the model
    host                                     a Linux with KVM: kernel, root file system, boot, snapshots
    vmm                                      its VMM: the agent's client, memory, VMs, vCPUs, VGIC
    machine, guest, agent                    the board; the payload in a VM; what runs inside the host
    model, support                           stage 2, VMIDs and notifiers as they have to be; errors, cache, programs

``agent`` is copied into the host's root file system and stands on the standard library alone.
"""
