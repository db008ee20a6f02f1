"""Tests of scripts, examples and documentation."""
