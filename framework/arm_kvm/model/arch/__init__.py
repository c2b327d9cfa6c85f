"""The architecture: table entries, regimes, walks, permissions, faults and syndromes of both stages.

Held against an independent implementation, the emulated CPU (``arm-kvm conform``).
"""
