"""Metrics: the divergence of two outputs, per token or per sequence."""
