"""Random sequences of what guests, host and VMM do, compared with the reference models after every step.

steps    the vocabulary and its text form
world    what must hold after each step: the state that the models predict (pure)
player   carries steps out on a host and compares
search   lets hypothesis look for a sequence that fails
"""
