"""The reference model: what the architecture and KVM's contract say, and nothing else.

Pure functions on integers and numpy arrays: no I/O, no process, no clock, no import of another room. In reading order:

    granule.py      4, 16 and 64 KiB: what follows from the page size
    descriptors.py  every bit of a translation table entry
    regime.py       control registers -> start level, root, sizes; or why they are impossible
    faults.py       accesses, and how a translation can fail
    stage1.py       permissions and attributes of the guest's own stage
    attributes.py   memory types of both stages, combined
    walk.py         the walk, one address at a time, written to be read
    sweep.py        the walk with numpy: all leaves, or many addresses
    syndrome.py     PAR, ESR, FAR, HPFAR after a translation
    changes.py      an entry changes: break-before-make, and what is taken from the guest
    memslots.py     guest-physical memory, its flags and its dirty log
    contract.py     what a stage-2 leaf may be, at every moment
    notifier.py     what the host's memory management owes to stage 2
    tables.py       how many table pages leaves need
    memcache.py     table pages, allocated before the lock is taken
    vmid.py         who gets which VMID, and what is invalidated when

What granule to syndrome say of a translation, its faults and its hardware updates is held against an independent
implementation, the emulated CPU (``arm-kvm conform``). The names of reserved encodings and everything from changes on
are written from the manual and the kernel's source, which each module cites. The checkers (oracle, events, sequences,
conform, the test cases) consult it and do not restate it.
"""
