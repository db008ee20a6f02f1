"""Tests on whole tiny models of every architecture."""
