"""The command ``pcg-compile``, also ``python -m pcg_compile``: the doctor of a machine, and readings of a trace."""

from __future__ import annotations

import argparse
import sys
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
    trace = commands.add_parser("explain-trace", help="say where the time of recorded steps went")
    trace.add_argument("file", help="what pcg.trace(path) or torch.profiler's export_chrome_trace(path) wrote")
    commands.add_parser("version", help="print the version")
    options = parser.parse_args(arguments)

    if options.command == "version":
        print(f"pcg-compile {__version__}")
        return 0
    if options.command == "explain-trace":
        from .errors import PCGError
        from .report.trace_file import read_trace

        try:
            print(read_trace(options.file))
        except (OSError, PCGError) as error:
            print(f"{options.file}: {error.strerror}" if isinstance(error, OSError) else error, file=sys.stderr)
            return 1
        return 0

    from .report.doctor import run_doctor

    return run_doctor(as_json=options.json)
