"""Expert selection: Algorithm 1 and its alternatives."""
