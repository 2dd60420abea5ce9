"""The command ``pcg-compile``, also ``python -m pcg_compile``: what this machine can do, and what to install."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code, 0 where it succeeds."""
    parser = argparse.ArgumentParser(prog="pcg-compile", description="Piecewise CUDA graphs for PyTorch.")
    parser.add_argument("--version", action="version", version=f"pcg-compile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="say what this machine can do, and what to install")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    commands.add_parser("version", help="print the version")
    options = parser.parse_args(arguments)

    if options.command == "version":
        print(f"pcg-compile {__version__}")
        return 0

    from .report.doctor import run_doctor

    return run_doctor(as_json=options.json)
