"""The search for experts, gates and layers (CD-MoE, Algorithms 1 and 2)."""
