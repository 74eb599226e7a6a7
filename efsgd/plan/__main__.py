"""Runs the command."""

import sys

from efsgd.plan import main

if __name__ == "__main__":
    sys.exit(main())
