"""The emulated board, seen from outside: QEMU's process, RAM, registers, console, QMP.

Knows of Linux only the words in which a kernel on the console says that it is lost.
"""
