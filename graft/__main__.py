"""`python -m graft`: see graft.cli."""

import sys

from graft.cli import main

if __name__ == "__main__":
    sys.exit(main())
