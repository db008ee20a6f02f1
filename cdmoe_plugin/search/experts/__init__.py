"""Expert selection: the choice of the routed experts that a layer keeps, by Algorithm 1 or one of its alternatives.

Only candidates may be kept: experts that were chosen by at least one calibration token. Every order is nested: the
choice of K - 1 experts is the beginning of that of K.
"""
