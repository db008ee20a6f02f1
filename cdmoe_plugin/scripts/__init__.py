"""The command line: one module per command of `cdmoe`, found by its name in main.py."""
