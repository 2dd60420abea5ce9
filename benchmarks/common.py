"""What all benchmarks share: arguments, the machine, a clock, and files of results."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Budget", "Clock", "Results", "add_common", "median_us", "one_line", "resolve", "sizes_of", "synchronize"]

_PACKAGES = ("torch", "triton", "flashinfer-python", "breakable-cuda-graphs", "numpy", "pcg-compile")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Arguments that every command takes."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tiny", action="store_true", help="a model of a few KB and few repeats: checks the benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and plots")
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b", help="size of the Llama")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the shape has")
    parser.add_argument("--repeats", type=int, help="timed runs; the median is reported (30; quick 20; tiny 3)")


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Fills in what was left to be chosen: the device, the repeats."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = torch.device(args.device)
    args.repeats = args.repeats or (3 if args.tiny else 20 if args.quick else 30)
    return args


def sizes_of(text: str | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of a comma-separated argument."""
    return tuple(int(part) for part in text.split(",")) if text else default


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_line(error: BaseException) -> str:
    """An error's type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def median_us(function: Callable[[], Any], repeats: int = 200, device: torch.device | None = None) -> float:
    """Median host time of a call in microseconds, after a tenth as many calls that are not timed."""
    for _ in range(max(3, repeats // 10)):
        function()
    times = []
    for _ in range(repeats):
        if device is not None:
            synchronize(device)
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return round(1e6 * statistics.median(times), 2)


@dataclass
class Clock:
    """Times of one variant, in milliseconds: until the host is done, until the device is, and of the device alone."""

    device: torch.device
    host: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], Any]) -> None:
        """Host and wall time of one call, begun with an idle device."""
        synchronize(self.device)
        started = time.perf_counter()
        call()
        done = time.perf_counter()
        synchronize(self.device)
        ended = time.perf_counter()
        self.host.append(1e3 * (done - started))
        self.wall.append(1e3 * (ended - started))

    def measure_gpu(self, call: Callable[[], Any]) -> None:
        """Time of the device alone: it is kept busy until the host has queued the whole call."""
        if self.device.type != "cuda":
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # In clock cycles, about 2 GHz; the host's time and a half.
        torch.cuda._sleep(int(2e6 * (0.2 + 1.5 * statistics.median(self.host or [1.0]))))
        begin.record()
        call()
        end.record()
        end.synchronize()
        self.gpu.append(begin.elapsed_time(end))

    def medians(self, prefix: str = "") -> dict[str, float]:
        """What was measured, by name."""
        lists = {"host_ms": self.host, "wall_ms": self.wall, "gpu_ms": self.gpu}
        return {prefix + name: round(statistics.median(times), 4) for name, times in lists.items() if times}


@dataclass
class Budget:
    """Seconds that a command may take; what is left to do then is skipped, with a reason."""

    seconds: float | None
    started: float = field(default_factory=time.perf_counter)

    def used(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    def over(self, share: float = 1.0) -> bool:
        """Whether more than a share of the budget is used."""
        return self.seconds is not None and self.used() > share * self.seconds


class Results(AbstractContextManager["Results"]):
    """A JSON file of one run, written after each row, and what is printed meanwhile."""

    def __init__(self, args: argparse.Namespace, name: str, notes: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            args: of the command, resolved. name: of the file, without its ending.
            notes: what the columns or variants are.
        """
        settings = {k: v for k, v in vars(args).items() if k not in ("run", "out")}
        self.path = args.out / f"{name}.json"
        self.data: dict[str, Any] = {
            "command": args.command,
            "argv": sys.argv[1:],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": machine(args.device),
            "versions": versions(),
            "settings": {
                k: v if isinstance(v, (int, float, bool, list, type(None))) else str(v) for k, v in settings.items()
            },
            "notes": dict(notes or {}),
            "rows": [],
        }
        args.out.mkdir(parents=True, exist_ok=True)
        self._started = time.perf_counter()

    def add(self, **row: Any) -> None:
        """One row; printed, and on disk when this returns."""
        self.data["rows"].append(row)
        print("  " + "  ".join(f"{k}={_short(v)}" for k, v in row.items() if v is not None), flush=True)
        self.save()

    def say(self, text: str) -> None:
        """A remark, printed and kept."""
        self.data.setdefault("remarks", []).append(text)
        print(f"  {text}", flush=True)
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        self.data["seconds"] = round(time.perf_counter() - self._started, 1)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(draft, self.path)

    def __exit__(self, *exc: Any) -> None:
        if exc[1] is not None:
            self.data["stopped"] = one_line(exc[1])
        self.save()
        from .report import plot

        drawn = plot(self.path)
        print(f"==> {self.path}" + (f", {drawn}" if drawn else ""), flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor and GPU."""
    found: dict[str, Any] = {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def versions() -> dict[str, str | None]:
    """Versions of what matters; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__
    return found
