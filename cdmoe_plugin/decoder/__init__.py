"""A decoder run one layer at a time."""
