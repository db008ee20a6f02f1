"""The classes of condensed models, their saving and registration."""
