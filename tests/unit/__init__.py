"""Tests of one part at a time, in under a minute: `make test-fast`."""
