"""Layer selection: the choice and order of the layers to condense, by Algorithm 2 or one of its alternatives.

Every order is nested and comes with the divergence of the model's output along it. That is the same quantity for all
methods, so their plans can be compared.
"""
