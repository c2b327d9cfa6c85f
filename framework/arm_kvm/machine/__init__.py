"""The emulated board, seen from outside: QEMU's process, RAM, registers, console, QMP.

All it knows of Linux is how a kernel reports on the console that it has panicked, oopsed or locked up.
"""
