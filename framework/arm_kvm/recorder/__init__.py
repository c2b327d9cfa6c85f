"""Records from outside the host how the hypervisor translates guests: see :class:`~.recorder.Recorder`.

``points`` finds the instructions to watch in RAM. Two mechanisms with one interface watch them: ``probe``, a TCG plugin
(``probe.c``, ``tables.c``) that takes about a microsecond for an event, and ``breakpoints`` of the gdbstub, which take
several milliseconds, for any QEMU and to check the probe. Either way the result is a
:class:`arm_kvm.events.trace.Trace`.
"""
