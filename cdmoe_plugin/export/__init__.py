"""Checkpoints for readers that do not know condensed models."""
