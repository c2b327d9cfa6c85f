"""The command line: ``arm-kvm COMMAND``.

main        the parser; runs a command; every error is one message and an exit code of its own
arguments   types of arguments, and how commands are added
output      tables and units
terminal    a person at a host's console

The others are the commands, a file for each group. What a command works with is imported where it runs, not at the
top of its file: numpy, paramiko and hypothesis take a second, and ``--help`` and ``arm-kvm test`` need none of them.
"""

from arm_kvm.cli.main import parser

__all__ = ["parser"]
