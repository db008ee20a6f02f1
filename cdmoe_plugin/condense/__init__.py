"""Sparse blocks folded into dense MLPs and put in their places."""
