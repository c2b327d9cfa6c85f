"""arm-kvm: a test lab for KVM/ARM whose judge stands outside the machine.

The rooms, and the one way imports run between them::

    plugin, cli  ->  oracle  ->  host -> machine
                            ->  guest
                            ->  model          (imports nothing)

``agent`` runs inside the host, on the standard library alone: it is copied into the root file
system, and only its wire format is used on this side. ``errors``, ``cache``, ``progress``,
``guardian``, ``lab`` and ``config`` serve all rooms but the model.
"""
