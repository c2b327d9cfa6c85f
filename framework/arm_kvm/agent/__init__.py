"""The agent: the VMM process inside the host. It needs only the standard library, on 32-bit and 64-bit hosts alike.

It carries out the lab's requests (KVM ioctls, memory operations, tracing) and judges nothing. It is copied into the
root file system as ``/usr/lib/arm-kvm/agent``. One agent starts with the host, the lab starts others over ssh.
"""
