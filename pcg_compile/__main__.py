"""``python -m pcg_compile doctor``: the command ``pcg-compile`` where it is not on the path."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
