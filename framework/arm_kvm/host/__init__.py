"""The Linux on the board: its kernel and root file system, how it boots, ssh, the agent, its VMs."""
