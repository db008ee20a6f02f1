# /// script
# dependencies = ["cdmoe_plugin[recipes]"]
# ///
"""Condense a sparse Mixture-of-Experts model: `cdmoe condense`, for `accelerate launch` and for checkouts."""

import sys

from cdmoe_plugin.scripts.main import main

if __name__ == "__main__":
    sys.exit(main(["condense", *sys.argv[1:]]))
