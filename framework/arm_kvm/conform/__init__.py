"""Conformance: the model against an independent implementation of the architecture, the emulated CPU itself.

A bare-metal program runs at EL2 (Hyp mode). The lab writes random tables into RAM; the program translates addresses
with AT instructions and with real guest accesses and reports PAR and the fault registers; the model predicts all of
them.

    layout.py       where things are in RAM, on both sides
    program.py      the program's image, from a32.S and a64.S
    case.py         one world: registers, tables, probes
    worlds.py       hypothesis strategies that make worlds
    predict.py      what the model says of a probe
    departures.py   where QEMU is known to leave the manual, by name
    silicon.py      the board that runs the program
    run.py          long runs: batches, seeds, differences
    picture.py      a difference as a picture of the walk
"""
