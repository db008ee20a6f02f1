"""`python -m cdmoe_plugin`: the command `cdmoe`, also where no console script is installed."""

import sys

from .scripts.main import main

if __name__ == "__main__":
    sys.exit(main())
