"""Tables and plots of results that exist."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "plot", "run", "table"]

Row = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="JSON files (default: all of benchmarks/results)")
    parser.add_argument("--plots", action="store_true", help="draw the plots again, too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints results as Markdown."""
    files = args.files or sorted((Path(__file__).parent / "results").glob("*.json"))
    if not files:
        print("no results yet: python -m benchmarks all --quick")
    for path in files:
        data = json.loads(path.read_text())
        machine, versions = data["machine"], data["versions"]
        parts = [machine.get("gpu") or machine["cpu"], f"torch {versions['torch']}", data["date"]]
        print(f"### {path.stem}\n{', '.join(parts)}; `python -m benchmarks {' '.join(data['argv'])}`\n")
        print("\n\n".join(tables(data)))
        for remark in data.get("remarks", ()):
            print(f"- {remark}")
        print()
        if args.plots:
            plot(path)


def tables(data: Mapping[str, Any]) -> list[str]:
    """A run's rows as Markdown tables, one for each kind of row."""
    rows = data["rows"]
    if data["command"] == "step":
        return [step_table(rows, key, title) for key, title in _STEP_TABLES if any(key in row for row in rows)]
    kinds: dict[Any, list[Row]] = {}
    for row in rows:
        kinds.setdefault(row.get("what"), []).append(row)
    return [table([{k: v for k, v in row.items() if k != "what"} for row in some]) for some in kinds.values()]


_STEP_TABLES = (
    ("ready_wall_ms", "ms a step, metadata ready (ratio to one graph of the full CUDA graph at the bucket)"),
    ("lists_wall_ms", "ms a step from host lists"),
    ("ready_host_ms", "host ms of a call, metadata ready"),
    ("ready_gpu_ms", "ms of the GPU alone"),
)


def step_table(rows: Sequence[Row], key: str, title: str) -> str:
    """One figure by variant and size. What is wrong, or does not run, says so."""
    sizes = sorted({row["n"] for row in rows})
    limits = {row["n"]: row[key] for row in rows if row["variant"] == "limit-bucket" and key in row}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    lines = []
    for variant in variants:
        cells: list[str] = [variant]
        for n in sizes:
            row = next((r for r in rows if r["variant"] == variant and r["n"] == n), {})
            cell = "-"
            if row.get("right") is False:
                cell = f"wrong ({row['error']:.2g})"
            elif key in row:
                cell = f"{row[key]:.3g}"
                # Where it was timed with the limit, their ratio in that run.
                ratio = row.get("over_limit") if key == "ready_wall_ms" else None
                ratio = ratio or (row[key] / limits[n] if n in limits else None)
                cell += f" ({ratio:.2f})" if ratio else ""
            cells.append(cell)
        lines.append(cells)
    return f"{title}:\n\n" + markdown(["variant", *(f"n={n}" for n in sizes)], lines)


def table(rows: Sequence[Row]) -> str:
    """Rows as they are; lists and mappings are left out."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if _plain(row.get(n) for row in rows)]
    return markdown(names, [[_cell(row.get(name)) for name in names] for row in rows])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _plain(values: Iterable[Any]) -> bool:
    found = [value for value in values if value is not None]
    return bool(found) and not any(isinstance(value, (list, dict)) for value in found)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(path: Path) -> Path | None:
    """Draws a file of results beside it as PNG; None without matplotlib, or where there is nothing to draw."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    data = json.loads(path.read_text())
    panels = _PANELS[data["command"]](data["rows"])
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * len(panels), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (kind, lines, labels) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        (_draw_bars if kind == "bars" else _draw_lines)(axes, lines)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=labels[2])
        if kind == "lines":
            axes.set_xscale("log", base=2)
        if kind == "lines" and labels[1].endswith("ms"):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend(fontsize="small")
    machine = data["machine"]
    shape = data.get("model") or ("tiny" if data["settings"]["tiny"] else data["settings"]["shape"])
    figure.suptitle(f"{machine.get('gpu') or machine['cpu']}, torch {data['versions']['torch']}, {shape}")
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    return target


Panel = tuple[str, dict[str, list[tuple[Any, float]]], tuple[str, str, str]]


def _draw_lines(axes: Any, lines: Mapping[str, Sequence[tuple[Any, float]]]) -> None:
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)


def _draw_bars(axes: Any, lines: Mapping[str, Sequence[tuple[Any, float]]]) -> None:
    places = list(dict.fromkeys(x for points in lines.values() for x, _ in points))
    width = 0.8 / len(lines)
    for i, (name, points) in enumerate(lines.items()):
        axes.bar([places.index(x) + i * width for x, _ in points], [y for _, y in points], width, label=name)
    middle = 0.4 - width / 2
    axes.set_xticks([i + middle for i in range(len(places))], [str(place) for place in places], fontsize="small")


def series(rows: Iterable[Row], x: str, y: str, by: str) -> dict[str, list[tuple[Any, float]]]:
    """Points (x, y) by the value of a column, of the rows that have all three."""
    found: dict[str, list[tuple[Any, float]]] = {}
    for row in rows:
        if all(row.get(name) is not None for name in (x, y, by)):
            found.setdefault(str(row[by]), []).append((row[x], row[y]))
    return found


def _step(rows: Sequence[Row]) -> list[Panel]:
    return [
        ("lines", series(rows, "n", key, "variant"), ("tokens", "ms", title))
        for key, title in (
            ("ready_wall_ms", "a step, metadata ready"),
            ("lists_wall_ms", "a step, from host lists"),
            ("ready_host_ms", "host time, metadata ready"),
        )
    ]


def _host(rows: Sequence[Row]) -> list[Panel]:
    parts = ("entry_us", "first_launch_us", "first_replay_us", "address_check_us")
    entry = {p: [(r["way"], r[p]) for r in rows if r["what"] == "entry" and p in r] for p in parts}
    times = ("batch_us", "batch_of_arrays_us", "step_us", "prepare_us", "plan_us", "total_us")
    metadata = {t: [(r["requests"], r[t]) for r in rows if r["what"] == "metadata" and t in r] for t in times}
    return [
        ("bars", {k: v for k, v in entry.items() if v}, ("", "us", "a call, without what it runs")),
        ("lines", {k: v for k, v in metadata.items() if v}, ("requests", "us", "a step's metadata")),
    ]


def _serve(rows: Sequence[Row]) -> list[Panel]:
    loops = {"at once": "at_once_ms", "late": "late_ms", "no wait": "no_wait_ms"}
    named = [{**row, "name": f"{row['way']}, {loop}", "ms": row[key]} for row in rows for loop, key in loops.items()]
    return [("bars", series(named, "requests", "ms", "name"), ("requests", "ms", "a decode step"))]


def _memory(rows: Sequence[Row]) -> list[Panel]:
    return [("bars", series(rows, "buckets", "device_mib", "way"), ("buckets", "MiB", "memory of warming up"))]


def _startup(rows: Sequence[Row]) -> list[Panel]:
    named = [{**row, "name": f"{row['way']}, {row['caches']}"} for row in rows]
    return [("bars", series(named, "layers", "first_step_s", "name"), ("layers", "s", "to the end of the first step"))]


def _capture(rows: Sequence[Row]) -> list[Panel]:
    return [
        ("bars", series(rows, "buckets", y, "compiler"), ("buckets", unit, title))
        for y, unit, title in (("seconds", "s", "captured graph"), ("mib", "MiB", "memory held"))
    ]


def _padding(rows: Sequence[Row]) -> list[Panel]:
    kinds = [{**row, "at": f"{row['bucket']}\n{row['fit']}"} for row in rows if row["what"] == "kinds"]
    times = {kind: [(row["at"], row[f"{kind}_wall_ms"]) for row in kinds] for kind in ("request", "slice") if kinds}
    wasted = [row for row in rows if row["what"] == "waste"]
    return [
        ("bars", series(wasted, "traffic", "waste", "table"), ("traffic", "padding / real tokens", "waste")),
        ("bars", times, ("bucket", "ms", "a step, metadata ready")),
    ]


def _crossover(rows: Sequence[Row]) -> list[Panel]:
    return [("lines", series(rows, "n", "ratio", "fill"), ("tokens", "captured / exact", "time of a step"))]


def _encoder(rows: Sequence[Row]) -> list[Panel]:
    named = [{**row, "name": f"{row['variant']}, {row.get('order', 'sorted')}"} for row in rows]
    speeds = series(named, "tokens", "sentences_per_s", "name")
    return [("lines", speeds, ("tokens a batch", "sentences / s", "embeddings"))]


def _throughput(rows: Sequence[Row]) -> list[Panel]:
    return [("bars", series(rows, "workload", "tokens_per_s", "variant"), ("", "new tokens / s", "generate_batch"))]


def _tensor_parallel(rows: Sequence[Row]) -> list[Panel]:
    named = [{**row, "name": f"{row['variant']}, {row['ranks']} ranks"} for row in rows]
    return [("lines", series(named, "n", "wall_ms", "name"), ("tokens", "ms", "a step, metadata ready"))]


def _lora_kernels(rows: Sequence[Row]) -> list[Panel]:
    named = [
        {**row, "name": f"{row['layer']}, {row['n']} tokens"} for row in rows if row["rank"] == 16 and row["adapters"]
    ]
    return [("lines", series(named, "adapters", "cold_us", "name"), ("adapters", "us", "shrink and expand, rank 16"))]


def _lora(rows: Sequence[Row]) -> list[Panel]:
    named = [
        {**row, "at": f"{row['tokens']}\n{row['adapters']} adapters", "rank": f"rank {row['ranks']}"}
        for row in rows
        if row["what"] in ("step", "ratio")
    ]
    # PEFT's bars would leave none of the others.
    ours = [row for row in named if row.get("variant", "").startswith("pcg") and row["rank"] == named[0]["rank"]]
    title = f"a step, metadata ready, {named[0]['rank']}" if named else ""
    ratios = {"lora_over_pcg": "pcg with adapters / without", "peft_over_lora": "PEFT / pcg, with adapters"}
    return [
        ("bars", series(ours, "at", "ready_wall_ms", "variant"), ("", "ms", title)),
        *(("bars", series(named, "at", key, "rank"), ("", "times", about)) for key, about in ratios.items()),
    ]


_PANELS: Mapping[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "step": _step,
    "host": _host,
    "serve": _serve,
    "memory": _memory,
    "startup": _startup,
    "capture": _capture,
    "padding": _padding,
    "crossover": _crossover,
    "encoder": _encoder,
    "throughput": _throughput,
    "tensor_parallel": _tensor_parallel,
    "soak": lambda rows: [],
    "attention": lambda rows: [],
    "attention_check": lambda rows: [],
    "lora": _lora,
    "lora_kernels": _lora_kernels,
}
