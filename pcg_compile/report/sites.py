"""The names of a graph's sites and of a program's calls, as reports show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..graph.plan import CallSite, PieceSite, Plan, Site
from ..runtime.program import Program

__all__ = ["CallKind", "CallName", "name_calls", "name_sites"]

CallKind = Literal["inputs", "replay", "piece", "split op", "metadata", "outputs"]

#: Ops that passes insert for a step's metadata.
_METADATA = ("pcg::prepare_", "pcg::pad_")


@dataclass(frozen=True)
class CallName:
    """What one call of a program is: a replay, a piece without a recording, a split op, or a step's metadata."""

    kind: CallKind
    name: str
    where: str


def name_sites(plan: Plan) -> dict[int, str]:
    """The name of each site by its index; pieces are counted from 0, split ops have their op's name."""
    names: dict[int, str] = {}
    pieces = 0
    for site in plan.sites:
        if isinstance(site, CallSite):
            names[site.index] = site.op.name
        elif site.trivial:
            names[site.index] = "allocation or view"
        elif site.split_reason is not None:
            names[site.index] = "split op, compiled"
        else:
            names[site.index] = f"piece {pieces}"
            pieces += 1
    return names


def name_calls(plan: Plan, program: Program) -> list[CallName]:
    """What each of a program's calls is, in their order."""
    recorded = {index for index, _ in program.recording_keys}
    names = name_sites(plan)
    sites = {site.index: site for site in plan.sites}
    return [
        CallName(_kind(sites[index], index in recorded), names[index], sites[index].where) for index in program.op_sites
    ]


def _kind(site: Site, recorded: bool) -> CallKind:
    if isinstance(site, PieceSite):
        return "replay" if recorded else "split op" if site.split_reason is not None else "piece"
    return "metadata" if site.op.name.startswith(_METADATA) else "split op"
