"""The command line: ``arm-kvm COMMAND``.

main        the parser; runs a command; turns every error into one message and an exit code
arguments   types of arguments, and how commands are added
output      tables and units
terminal    the user's terminal on a host's console

The other modules are the commands, one module for each group. They import what a command needs inside its function:
numpy, paramiko and hypothesis take a second to import, and ``--help`` and ``arm-kvm test`` need none of them.
"""

from arm_kvm.cli.main import parser

__all__ = ["parser"]
