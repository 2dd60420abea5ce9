"""Pictures of a report: where a step's time goes, and how much of each bucket is padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from ..errors import message
from ..stats import Stats
from .items import number_range, without_numbers
from .timeline import Span, Timeline

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError(
        message("a plot needs matplotlib, which is not installed", cure="Write: pip install matplotlib")
    ) from error

__all__ = ["COLOURS", "Bar", "Picture", "bars_of", "draw_buckets", "draw_timelines", "plot_report"]

#: One colour for each kind of call, told apart by colour-blind readers too (Okabe and Ito).
COLOURS = {
    "inputs": "#56b4e9",
    "metadata": "#e69f00",
    "replay": "#0072b2",
    "piece": "#d55e00",
    "split op": "#009e73",
    "outputs": "#cc79a7",
    "gaps": "#999999",
}
_SHOWN = {
    "inputs": "copied in",
    "replay": "replay",
    "piece": "not captured",
    "split op": "split op",
    "outputs": "copied out",
}
_TOKENS, _PADDING = COLOURS["replay"], "#c7c7c7"
#: Characters of a label.
_WIDEST = 64


class Picture(Figure):
    """A figure that a notebook shows by itself, whether or not ``pyplot`` was imported."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", dpi=100)
        return png.getvalue()


@dataclass(frozen=True)
class Bar:
    """Calls of a step that differ in their layer alone.

    Attributes:
        kind: of the calls, or "gaps". seconds: of all of them together. times: their number.
    """

    kind: str
    label: str
    seconds: float
    times: int

    @property
    def text(self) -> str:
        """What stands beside it, without the share."""
        return _time(self.seconds) + (f" = {self.times} x {_time(self.seconds / self.times)}" if self.times > 1 else "")


def bars_of(timelines: Sequence[Timeline]) -> list[Bar]:
    """The bars of a step, in order: times on the device, or on a CPU the host's."""
    bars: list[Bar] = []
    for number, timeline in enumerate(timelines):
        graph = f"graph {number}, " if len(timelines) > 1 else ""
        groups: dict[tuple[str, str, str], list[Span]] = {}
        for span in timeline.lane():
            groups.setdefault((span.kind, without_numbers(span.name), without_numbers(span.module)), []).append(span)
        for (kind, *_), spans in groups.items():
            names = (number_range(getattr(spans[0], part), getattr(spans[-1], part)) for part in ("name", "module"))
            label = "  ".join(name for name in (*names, _SHOWN.get(kind, "")) if name)
            bars.append(Bar(kind, graph + label, sum(span.seconds for span in spans), len(spans)))
        bars.append(Bar("gaps", f"{graph}between calls", timeline.gap_seconds(), 1))
    return bars


def plot_report(timelines: Sequence[Timeline], stats: Stats) -> Picture:
    """Where a step's time goes above, one bar for each bucket below."""
    rows = [max(2, len(bars_of(timelines))), max(2, len(stats.buckets))]
    figure = Picture(figsize=(11, 1.2 + 0.3 * sum(rows)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=rows)
    draw_timelines(above, timelines)
    draw_buckets(below, stats)
    return figure


def draw_timelines(axes: Any, timelines: Sequence[Timeline]) -> None:
    """One bar for equal calls of all layers, as long as they take together.

    Args:
        axes: matplotlib's. timelines: of the graphs that one forward consists of, in order.
    """
    bars = bars_of(timelines)
    if not bars:
        return _say(axes, "no step was timed: pass a call's arguments to pcg.explain()")
    whole = sum(bar.seconds for bar in bars) or 1.0
    texts = [f"{bar.seconds / whole:.0%}   {bar.text}" for bar in bars]
    labels = [bar.label if len(bar.label) <= _WIDEST else bar.label[: _WIDEST - 1] + "…" for bar in bars]
    _draw(axes, labels, [[bar.seconds for bar in bars]], [[COLOURS[bar.kind] for bar in bars]], texts)
    lane = "GPU" if any(span.lane == "device" for timeline in timelines for span in timeline.spans) else "host"
    axes.set_title("\n".join(timeline.describe() for timeline in timelines) + f" ({lane} time)", loc="left")


def draw_buckets(axes: Any, stats: Stats) -> None:
    """For each bucket the rows that its steps computed: those of tokens, and padding behind them."""
    used = {size: use for size, use in stats.buckets.items() if use.padded_tokens}
    if not used:
        return _say(axes, "no step has used a bucket yet")
    widths = [[use.tokens for use in used.values()], [use.padded_tokens - use.tokens for use in used.values()]]
    texts = [f"{use.padding:.0%} padding   {use.padded_tokens:,} rows, {use.hits} steps" for use in used.values()]
    _draw(axes, [f"bucket {size}" for size in used], widths, [[_TOKENS] * len(used), [_PADDING] * len(used)], texts)
    axes.set_title("rows computed in each bucket: tokens (blue) and padding (grey)", loc="left")


def _draw(axes: Any, labels: Sequence[str], parts: Sequence[Sequence[float]], colours: Any, texts: Any) -> None:
    """Horizontal bars, the first above, each made of parts from left to right, with text behind."""
    ends = [0.0] * len(labels)
    for widths, colour in zip(parts, colours, strict=True):
        axes.barh(range(len(labels)), widths, left=list(ends), height=0.7, color=colour)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    longest = max(ends) or 1.0
    for row, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axes.text(end + 0.01 * longest, row, text, va="center", fontsize="small")
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.set_ylim(len(labels) - 0.5, -0.5)
    # Room for the text behind the longest bar.
    axes.set_xlim(0, 1.5 * longest)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def _say(axes: Any, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
