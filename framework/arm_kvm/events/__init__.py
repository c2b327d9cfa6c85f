"""A trace of what the CPUs did, and the automata that judge it. Pure: no machine, no clock.

``trace`` is the format, ``operations`` the architecture's invalidations. ``checker`` runs the ``automata``, which share
a ``world`` and report ``violations``; ``allocation`` compares VMIDs with the reference model. ``history`` arranges a
trace as guest runs and moments, ``picture`` draws it.
"""
