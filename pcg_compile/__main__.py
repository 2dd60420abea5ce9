"""``python -m pcg_compile doctor``: what this machine can do, and what to install."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, 0 where the essentials work."""
    parser = argparse.ArgumentParser(prog="python -m pcg_compile", description="Piecewise CUDA graphs for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what this machine can do, and what to install")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(arguments)

    from .report.doctor import run_doctor

    return run_doctor(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
