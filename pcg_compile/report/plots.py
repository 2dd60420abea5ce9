"""Pictures of a report: where a step's time goes, and how much of each bucket is padding."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from ..errors import message

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError(
        message(
            "a plot needs matplotlib, which is not installed",
            cure="Write: pip install matplotlib; in a checkout of pcg also: pip install '.[plots]'",
        )
    ) from error

if TYPE_CHECKING:
    from ..stats import Stats
    from .explain import Report
    from .timeline import Timeline

__all__ = ["Picture", "draw_buckets", "draw_timelines", "plot_report"]

#: Colours that remain apart for readers who see few of them.
_COLOURS = {
    "replay": "#0072b2",
    "piece": "#d55e00",
    "split op": "#009e73",
    "metadata": "#e69f00",
    "inputs": "#56b4e9",
    "outputs": "#cc79a7",
}
_TOKENS, _PADDING = "#0072b2", "#b3b3b3"
_MEANING = {"replay": "replay of a captured graph", "piece": "uncaptured piece", "metadata": "the step's metadata"}
#: Of a lane's width: narrower bars have no room for their name.
_ROOM_FOR_A_NAME = 0.07


class Picture(Figure):
    """A figure that a notebook shows by itself, whether or not ``pyplot`` was imported."""

    def _repr_png_(self) -> bytes:
        png = BytesIO()
        self.savefig(png, format="png", dpi=100)
        return png.getvalue()


def plot_report(report: Report) -> Picture:
    """A step's timeline above, padding by bucket below."""
    timelines = [graph.timeline for graph in report.graphs if graph.timeline is not None]
    lanes = sum(len(_lanes(timeline)) for timeline in timelines)
    figure = Picture(figsize=(9, 4 + 0.6 * max(lanes, 1)), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[max(lanes, 1) + 0.5, 2.5])
    draw_timelines(above, timelines)
    draw_buckets(below, report.stats)
    return figure


def draw_timelines(axes: Any, timelines: list[Timeline]) -> None:
    """One bar a call, one lane for the host and, on a GPU, one for the device; what is white is a gap.

    Args:
        axes: matplotlib's. timelines: of the graphs that one forward consists of, in order.
    """
    spans = [span for timeline in timelines for span in timeline.spans]
    if not spans:
        return _say(axes, "no step was timed: pass a call's arguments to pcg.explain()")
    longest = max(timeline.seconds for timeline in timelines)
    unit, scale = ("us", 1e6) if longest < 1e-3 else ("ms", 1e3)
    rows: list[str] = []
    for number, timeline in enumerate(timelines):
        for lane in _lanes(timeline):
            row = len(rows)
            rows.append(f"graph {number}, {lane}" if len(timelines) > 1 else lane)
            for span in timeline.spans:
                if span.lane == lane:
                    _bar(axes, row, span.start * scale, span.seconds * scale, span.kind, span.name, longest * scale)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, longest * scale * 1.01)
    axes.set_xlabel(unit)
    axes.set_title("; ".join(_title(timeline) for timeline in timelines), fontsize="medium")
    kinds = [kind for kind in _COLOURS if any(span.kind == kind for span in spans)]
    patches = [Patch(color=_COLOURS[kind], label=_MEANING.get(kind, kind)) for kind in kinds]
    patches.append(Patch(facecolor="white", edgecolor="grey", label="gap"))
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)


def draw_buckets(axes: Any, stats: Stats) -> None:
    """For each bucket the tokens that its steps had and the padding on top, with the padding's share."""
    used = {size: use for size, use in stats.buckets.items() if use.padded_tokens}
    if not used:
        return _say(axes, "no step has used a bucket yet")
    places = range(len(used))
    tokens = [use.tokens for use in used.values()]
    padding = [use.padded_tokens - use.tokens for use in used.values()]
    axes.bar(places, tokens, 0.6, color=_TOKENS, label="tokens")
    axes.bar(places, padding, 0.6, bottom=tokens, color=_PADDING, label="padding")
    for place, use, added in zip(places, used.values(), padding, strict=True):
        axes.annotate(
            f"{added / use.padded_tokens:.0%}", (place, use.padded_tokens), ha="center", va="bottom", fontsize="small"
        )
    axes.set_xticks(places, [str(size) for size in used])
    axes.set_xlabel("bucket")
    axes.set_ylabel("rows computed")
    axes.set_xlim(-0.7, len(used) - 0.3)
    axes.margins(y=0.15)
    axes.set_title("padding, and its share of what each bucket computed", fontsize="medium")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)


def _lanes(timeline: Timeline) -> list[str]:
    return list(dict.fromkeys(span.lane for span in timeline.spans))


def _bar(axes: Any, row: int, start: float, width: float, kind: str, name: str, whole: float) -> None:
    axes.barh(row, width, left=start, height=0.7, color=_COLOURS[kind], edgecolor="black", linewidth=0.3)
    if width > _ROOM_FOR_A_NAME * whole:
        text = name if len(name) < 100 * width / whole else name.rpartition("::")[2]
        axes.text(
            start + width / 2, row, text, ha="center", va="center", color="white", fontsize="x-small", clip_on=True
        )


def _title(timeline: Timeline) -> str:
    size = "x".join(map(str, timeline.sizes)) or "no dynamic size"
    bucket = "x".join(map(str, timeline.bucket or ()))
    how = "without captured graphs" if timeline.bucket is None else f"in bucket {bucket}" if bucket else "captured"
    share = timeline.gap_seconds() / timeline.seconds if timeline.seconds else 0.0
    return f"a step of {size} {how}: {1e3 * timeline.seconds:.3g} ms, {share:.1%} of it in gaps"


def _say(axes: Any, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
