"""Constant gates of condensed layers, one file for each method."""
