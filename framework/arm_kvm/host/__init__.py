"""The Linux on the board: its kernel and root file system, boot, snapshots, ssh, the agent, its VMs."""
