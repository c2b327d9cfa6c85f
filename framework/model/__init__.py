"""The reference model: what the architecture and KVM's contract say, and nothing else.

Pure functions on integers and numpy arrays: no I/O, no process, no clock, no import of
another room. A walker takes memory as a callable, so it runs alike on a live machine's RAM,
on a saved dump and on a table that a test made up.
"""
