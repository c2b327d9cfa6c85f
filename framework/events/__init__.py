"""What the CPUs did, as a trace of events, and the automata that judge it. Pure: no machine, no clock.

``trace`` is the format, ``operations`` the architecture's invalidations, ``checker`` runs the ``automata``,
``allocation`` holds VMIDs against the reference model, ``picture`` draws.
"""
