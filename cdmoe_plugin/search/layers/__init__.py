"""Layer selection: Algorithm 2 and its alternatives."""
