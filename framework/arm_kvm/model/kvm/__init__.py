"""KVM's side of the contract: memslots, VMIDs, page-table memory, and what the MMU notifiers owe.

Written from the kernel's source and documentation, which each module cites.
"""
