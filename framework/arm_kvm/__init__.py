"""arm-kvm: a test lab for KVM/ARM whose judge stands outside the machine.

The rooms; imports go down only, from line to line::

    plugin, cli                      the doors: pytest's, and the command line's
    sequences, mutants, conform      what tests the kernel at random, the suite, and the model
    recorder                         sees VTTBR writes, invalidations and entries, and makes a trace of them
    oracle, events                   hold stage-2 tables, and traces, against the model
    host                             a Linux with KVM, and its VMs
    machine, guest                   the board; the payload
    model                            stage 2, VMIDs and notifiers as they have to be; imports nothing

``agent`` runs inside the host, on the standard library alone: it is copied into the root file
system, and only its wire format is used on this side. ``pool`` has the hosts of a run, ``spares``
those to come; ``errors``, ``cache``, ``progress``, ``guardian``, ``lab`` and ``config`` serve all
rooms but the model.
"""
