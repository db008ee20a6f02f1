"""Condensing as a method of PEFT: condensed MLPs beside the sparse blocks of a base model that stays whole."""

# Before any module of this package: its import registers the method, for which the modules below should not be half
# imported.
import peft  # noqa: F401
