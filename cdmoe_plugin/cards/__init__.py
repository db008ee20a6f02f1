"""Model cards and tables."""
