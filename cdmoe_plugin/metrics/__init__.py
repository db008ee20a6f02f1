"""Metrics: how far two outputs are apart, token by token, or sequence by sequence."""
