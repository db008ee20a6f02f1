"""Constant gates for condensed layers."""
