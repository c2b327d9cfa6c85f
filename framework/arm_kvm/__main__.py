"""The entry point of ``arm-kvm``. It imports little at first, so that Ctrl-C is handled from the start."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

from arm_kvm.support import interrupt

_INTERRUPTED, _NO_FOLDER = 130, 2


def main() -> int:
    """Run the command line and return its exit code."""
    interrupt.listen()
    if not _in_a_folder():
        return _NO_FOLDER
    try:
        _open_streams()
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # as on stderr: the locale may lack a name's characters
        from arm_kvm.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if interrupt.heard():
        interrupt.deaf()
        return _INTERRUPTED
    return code


def _in_a_folder() -> bool:
    """Whether the current folder still exists; prints an error if not."""
    try:
        os.getcwd()
    except OSError:
        print("arm-kvm: the current folder is gone: change to another", file=sys.stderr)
        return False
    return True


def _open_streams() -> None:
    """Open standard streams that the caller has closed on /dev/null, lest a machine's socket take their numbers."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


if __name__ == "__main__":
    sys.exit(main())
