"""Conformance: compare the model with an independent implementation of the architecture, the emulated CPU.

A bare-metal program runs at EL2 (Hyp mode). The lab writes random tables into RAM; the program translates addresses
with AT instructions and guest accesses and reports PAR and the fault registers; the model predicts them.

    layout.py       the addresses in RAM, on both sides
    program.py      the program's image, from a32.S and a64.S
    case.py         a world: registers, tables, probes
    registers.py    values of the control registers
    tables.py       strategies for translation tables
    probes.py       strategies for probes
    worlds.py       the strategy for whole worlds
    predict.py      the model's prediction for a probe
    departures.py   known deviations of QEMU from the manual, by name
    silicon.py      the board that runs the program
    run.py          long runs: batches, seeds, differences
    picture.py      a difference as text, with the walk
"""
