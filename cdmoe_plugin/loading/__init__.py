"""Loading of sparse checkpoints, as condensed models or one layer at a time."""
