"""What the CPUs did, as a trace of events, and the automata that judge it. Pure: no machine, no clock.

``trace`` is the format, ``operations`` the architecture's invalidations. ``checker`` runs the ``automata``, which share
a ``world`` and report ``violations``; ``allocation`` holds VMIDs against the reference model. ``history`` tells a trace
as stays and moments, ``picture`` draws it.
"""
