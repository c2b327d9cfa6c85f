"""The architecture: table entries, regimes, walks, permissions, faults and syndromes of both stages.

Compared with an independent implementation, the emulated CPU (``arm-kvm conform``).
"""
