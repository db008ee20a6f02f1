"""Folding sparse blocks into dense MLPs, and putting these into the model."""
