"""The agent: runs inside the host, on the standard library alone, 32 and 64 bits alike.

It carries out what the lab asks (KVM ioctls, memory operations, tracing) and judges nothing.
Copied into the root file system as ``/usr/lib/arm-kvm/agent``; the lab starts it over ssh.
"""
