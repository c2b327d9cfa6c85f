"""Kernels broken on purpose: does the suite notice?

catalogue     the mutants of configs/mutants: the fault, why it matters, how it is put in
fingerprint   recognises a function of any kernel
patching      puts a mutant into the text of a running kernel
source        puts a mutant into the source that a kernel is built from
trial         tries one mutant against the cases and decides its fate
score         the fates of all mutants, as a table
"""
