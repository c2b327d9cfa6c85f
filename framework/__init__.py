"""arm-kvm: a test lab for KVM/ARM whose judge stands outside the machine.

The rooms, and the one way imports run between them::

    plugin, cli  ->  oracle  ->  host -> machine
                            ->  guest
                            ->  model          (imports nothing)

``agent`` is the exception that proves the rule: it is imported by nobody here, it is
copied into the host's root file system and runs there on the standard library alone.
"""
