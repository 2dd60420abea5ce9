"""The README's chart: milliseconds a token of a 1B model, drawn as an SVG from a file of results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

__all__ = ["SOURCE", "TARGET", "add_arguments", "chart", "run"]

ROOT = Path(__file__).resolve().parent.parent
#: The results that the README shows: of ``step``, or of ``throughput`` with the workload "single".
SOURCE = ROOT / "benchmarks" / "results" / "single-1b-h200.json"
TARGET = ROOT / "docs" / "images" / "ms-a-token.svg"

#: For each command that can be drawn: what is drawn, the column, and the variants with their labels, in order.
_DRAWN: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "step": (
        "one decode step of one request",
        "ready_wall_ms",
        {
            "eager": "eager PyTorch",
            "compile": "torch.compile",
            "pcg": "pcg, piecewise",
            "pcg-whole": "pcg, full graph",
            "limit-exact": "bare CUDA graph",
        },
    ),
    "throughput": (
        "one request, 128 new tokens",
        "ms_per_token",
        {
            "generate": "generate()",
            "static": "generate(), static cache",
            "pcg": "pcg, generate_batch()",
            "limit": "the same, GPU alone",
        },
    ),
}
_WIDTH, _BAR, _STEP, _LEFT, _TOP = 720, 24, 36, 190, 44
_STYLE = (
    "text{font:14px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2328}.title{font-weight:600}"
    ".note{font-size:12px;fill:#59636e}.other{fill:#8c959f}.pcg{fill:#0969da}.value{font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.note{fill:#9198a1}.other{fill:#6e7681}.pcg{fill:#4493f8}}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", type=Path, default=SOURCE, help=f"results ({SOURCE.name})")
    parser.add_argument("--out", type=Path, default=TARGET, help=f"the SVG ({TARGET.relative_to(ROOT)})")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Draws the chart."""
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(chart(json.loads(args.file.read_text())), encoding="utf-8")
    print(f"wrote {args.out}")


def bars(data: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Variant, label and milliseconds of each bar; variants whose numbers were wrong are left out."""
    _, column, labels = _DRAWN[data["command"]]
    rows = [row for row in data["rows"] if row.get("workload", "single") == "single" and row.get("n", 1) == 1]
    found = {row["variant"]: row[column] for row in rows if column in row and row.get("right", True)}
    for row in rows:
        if row["variant"] == "pcg" and "limit_tokens_per_s" in row:
            # Its decode steps alone, launched without waiting for a token.
            found["limit"] = 1e3 / row["limit_tokens_per_s"]
    return [(variant, label, found[variant]) for variant, label in labels.items() if variant in found]


def chart(data: Mapping[str, Any]) -> str:
    """Horizontal bars with their values, as an SVG that follows a page's light or dark colours."""
    about = _DRAWN[data["command"]][0]
    drawn = bars(data)
    longest = max(value for *_, value in drawn)
    height = _TOP + _STEP * len(drawn) + 30
    machine = f"{data['machine']['gpu']}, torch {data['versions']['torch'].partition('+')[0]}, {data['date'][:10]}"
    title = f"Milliseconds a token: Llama, 1B parameters, bfloat16, {about}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<text class="title" x="0" y="20">{escape(title)}</text>',
    ]
    for i, (variant, label, value) in enumerate(drawn):
        y = _TOP + _STEP * i
        width = round((_WIDTH - _LEFT - 90) * value / longest, 1)
        kind = "pcg" if variant.startswith("pcg") else "other"
        lines += [
            f'<text x="{_LEFT - 10}" y="{y + 17}" text-anchor="end">{escape(label)}</text>',
            f'<rect class="{kind}" x="{_LEFT}" y="{y}" width="{width}" height="{_BAR}" rx="2"/>',
            f'<text class="value" x="{_LEFT + width + 8:g}" y="{y + 17}">{value:.2f} ms</text>',
        ]
    lines += [f'<text class="note" x="0" y="{height - 8}">{escape(machine)}; less is better</text>', "</svg>", ""]
    return "\n".join(lines)
