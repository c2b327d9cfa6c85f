"""The lab's view of the VMM in the host: its agent, memory, VMs, vCPUs and VGICs, and threads for races."""
