"""`python -m patchloom`, the same as the command `patchloom`."""

import sys

from patchloom.cli import main

if __name__ == "__main__":
    sys.exit(main())
