"""Random sequences of what guests, host and VMM do, held against the reference models after every step.

``steps`` is the vocabulary and its text form, ``world`` what must hold after each step (pure), ``player`` carries steps
out on a host and compares, ``search`` lets hypothesis look for a sequence that fails.
"""
