"""The emulated board, seen from outside: QEMU's process, RAM, registers, console, QMP.

Knows nothing of Linux: the same machine would carry any operating system.
"""
