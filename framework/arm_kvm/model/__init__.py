"""The reference model of the architecture and of KVM's contract.

Pure functions on integers and numpy arrays: no I/O, no process, no clock, no import of another room. In reading order:

    granule.py      4, 16 and 64 KiB: what follows from the page size
    descriptors.py  every bit of a translation table entry
    reserved.py     reserved encodings, by name
    regime.py       control registers -> start level, root, sizes; or why they are impossible
    faults.py       accesses, and the faults of a translation
    stage1.py       permissions and attributes of the guest's stage 1
    attributes.py   memory types of both stages, combined
    walk.py         the walk, one address at a time, written for readability
    sweep.py        the walk with numpy: all leaves, or many addresses
    syndrome.py     PAR, ESR, FAR, HPFAR after a translation
    changes.py      changes of an entry: break-before-make, and what the guest loses
    memslots.py     guest-physical memory, its flags and its dirty log
    contract.py     what a stage-2 leaf may be at any moment
    notifier.py     what each operation of the host's memory management requires of stage 2
    tables.py       how many table pages a set of leaves needs
    memcache.py     table pages that are allocated before the lock is taken
    vmid.py         which VM gets which VMID, and what is invalidated when

The modules from granule to syndrome, except reserved, are compared with an independent implementation, the emulated
CPU (``arm-kvm conform``), on translations, faults and hardware updates. The names of reserved encodings and everything
from changes on are written from the manual and the kernel's source, which each module cites. The checkers (oracle,
events, sequences, conform, the test cases) consult the model and do not restate it.
"""
