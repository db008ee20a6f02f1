"""Export of condensed models to checkpoints that open without this package."""
