"""`python -m smalti …`: the same as the console script `smalti`."""

from __future__ import annotations

import sys

from smalti.cli import main

if __name__ == "__main__":
    sys.exit(main())
