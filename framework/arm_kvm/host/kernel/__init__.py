"""The host's kernel, from one of four sources.

    file      an image on this machine
    deb       a Debian package of any suite
    tarball   a release tarball, downloaded and built
    tree      a source tree, with or without patches, built

Each source is a function from its keys in the host file to a :class:`Kernel`; :func:`obtain` chooses.
"""

from arm_kvm.host.kernel.kernel import Kernel
from arm_kvm.host.kernel.sources import obtain

__all__ = ["Kernel", "obtain"]
