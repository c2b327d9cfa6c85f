"""The VMM inside the host, as the lab holds it: its agent, memory, VMs, vCPUs, VGIC, and what it does at once."""
