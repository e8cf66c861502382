"""``python -m crossft.cli`` is ``crossft``."""

import sys

from crossft.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
