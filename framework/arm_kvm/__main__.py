"""Where ``arm-kvm`` begins: before anything is loaded that takes a while, so that Ctrl-C is heard from the start."""

from __future__ import annotations

import os
import sys

from arm_kvm.support import interrupt

_INTERRUPTED, _NO_FOLDER = 130, 2


def main() -> int:
    """Run the command line; its exit code."""
    interrupt.listen()
    if not _in_a_folder():
        return _NO_FOLDER
    try:
        _open_streams()
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that this locale has no letters for, as on stderr
        from arm_kvm.cli.main import main

        code = main()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if interrupt.heard():
        interrupt.deaf()
        return _INTERRUPTED
    return code


def _in_a_folder() -> bool:
    """Whether the folder that this was started in is still there; if not, that is said."""
    try:
        os.getcwd()
    except OSError:
        print("arm-kvm: the folder that this was started in is gone: go to another", file=sys.stderr)
        return False
    return True


def _open_streams() -> None:
    """A standard stream that the caller has closed is /dev/null, lest a machine's socket take its number."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, os.fdopen(fd, mode, closefd=False))


if __name__ == "__main__":
    sys.exit(main())
