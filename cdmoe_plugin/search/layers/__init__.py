"""Layer selection: which sparse layers are condensed and in which order, by Algorithm 2 or one of its alternatives.

Every order is nested, and comes with the divergence of the model's output along it: the same quantity for all methods,
so that their plans can be compared.
"""
