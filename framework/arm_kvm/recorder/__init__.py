"""Records what the hypervisor does to the translation of guests, from outside: see :class:`~.recorder.Recorder`.

``points`` finds the instructions in RAM. Two mechanisms watch them, behind one interface: ``probe``, a TCG plugin
(``probe.c``), about a microsecond an event; ``breakpoints``, through the gdbstub, several milliseconds an event, for
any QEMU and to check the probe. Both make a :class:`arm_kvm.events.trace.Trace`.
"""
