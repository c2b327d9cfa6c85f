"""Kernels broken on purpose: does the suite notice?

catalogue   the mutants of configs/mutants: what is broken, why that matters, how it is put in
patching    a mutant put into the text of a running kernel
trial       one mutant against the cases: what becomes of it
score       what became of each, as a table
"""
