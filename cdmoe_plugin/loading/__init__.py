"""Checkpoints opened as condensed models, or one layer at a time."""
