"""Model architectures that transformers itself does not hold."""
