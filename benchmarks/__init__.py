"""Benchmarks: ``python -m benchmarks <command> --help``."""
