"""Expert selection: which routed experts a condensed layer keeps, by Algorithm 1 or by one of its alternatives.

Only candidates may be kept, that is experts that a calibration token chose. Every order is nested: the choice for
K - 1 experts is the beginning of that for K.
"""
