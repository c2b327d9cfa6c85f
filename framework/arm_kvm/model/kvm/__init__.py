"""KVM's side of the contract: memslots, VMIDs, page-table memory, and the duties of MMU notifiers.

Written from the kernel's source and documentation, which each module cites.
"""
