"""The statements whose verdict is fixed, and how to run one of them."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: What a captured graph does with a write to (or a read of) a tensor on the capture device.
REJECTED, FINE, COPIES, WAITS = "rejected", "fine", "copies", "waits"
#: Verdicts by the kind of a hazard, and kinds by verdict.
VERDICT_OF = {"scalar write": REJECTED, "host copy": COPIES, "sync": WAITS, "dynamic shape": WAITS}
KINDS = {REJECTED: {"scalar write"}, COPIES: {"host copy"}, WAITS: {"sync", "dynamic shape"}}

#: Fine from torch 2.15 on, which puts the number on the device by a fill.
NUMBER_BY_INDEX = ("t[index] = 4", "t2[index, 0] = 3")

#: (statement, verdict); see :func:`values` for the names.
TABLE: tuple[tuple[str, str], ...] = (
    ("t[0] = 0", REJECTED),
    ("t[-1] = 7", REJECTED),
    ("t[0, ...] = 2", REJECTED),
    ("t2[i, j] = 1.0", REJECTED),
    ("t[0] = True", REJECTED),
    ("t[0] = n.shape[0]", REJECTED),
    ("t[0:4][1] = 3", REJECTED),
    ("t0[...] = 1", REJECTED),
    ("t0[()] = 1", REJECTED),
    ("t.__setitem__(0, 5)", REJECTED),
    ("t2[0] = 0", FINE),
    ("t[0:1] = 0", FINE),
    ("t[1:] = 5", FINE),
    ("t[...] = 1", FINE),
    ("t[0:1].zero_()", FINE),
    ("t[0].fill_(0)", FINE),
    ("t[2] = n[0]", FINE),
    ("t[mask] = 0", FINE),
    ("t2[row_mask] = 0", FINE),
    ("t2[row_mask, 0] = 0", FINE),
    ("t2[:, row_mask] = 0", FINE),
    ("t[0] += 1", FINE),
    ("t[None] = 2", FINE),
    ("t[True] = 2", FINE),
    ("t2[:, 0] = 5", FINE),
    ("t[index] = n[:2]", FINE),
    ("t[index] = n[0]", FINE),
    ("t[index] += 1", FINE),
    ("t.index_fill_(0, index, 3)", FINE),
    ("t.scatter_(0, index, 4.0)", FINE),
    ("t.masked_fill_(mask, 1.0)", FINE),
    ("t[0].copy_(n[0])", FINE),
    ("t.copy_(torch.where(mask, 0.0, t))", FINE),
    ("t.add_(torch.full((), 2.0, device=t.device))", FINE),
    ("t.add_(t[index].sum())", FINE),
    ("t.add_(torch.arange(8, device=t.device))", FINE),
    ("t.add_(torch.repeat_interleave(n[:2], index, output_size=3).sum())", FINE),
    ("t.add_(torch.rand(8, device=t.device))", FINE),
    ("t[3] = torch.tensor(3)", COPIES),
    ("t[0].copy_(torch.tensor(3.0))", COPIES),
    ("t[torch.tensor([1, 2])] = 4", COPIES),
    ("t[[1, 2]] = 4", COPIES),
    ("t[index] = 4", COPIES),
    ("t2[index, 0] = 3", COPIES),
    ("t.add_(t[[1, 2]].sum())", COPIES),
    ("t.add_(torch.tensor([5], device=t.device))", COPIES),
    ("t.add_(t.new_tensor([5]))", COPIES),
    ("t.add_(torch.as_tensor([5.0], device=t.device))", COPIES),
    ("t.add_(torch.tensor([5.0]).to(t.device))", COPIES),
    ("t.add_(torch.where(mask, torch.tensor(0.0), t))", COPIES),
    ("t[mask] = n[0]", WAITS),
    ("t[mask] = n[:1]", WAITS),
    ("t2[row_mask, row_mask] = 0", COPIES),
    ("t.masked_fill_(mask, n[0])", WAITS),
    ("t.index_fill_(0, index, n[0])", WAITS),
    ("t.mul_(n[0].item())", WAITS),
    ("t.mul_(index.tolist()[0])", WAITS),
    ("t.mul_(int(index[0]))", WAITS),
    ("t.mul_(mask.nonzero().shape[0])", WAITS),
    ("t.add_(t[mask].sum())", WAITS),
    ("t.add_(torch.masked_select(t, mask).sum())", WAITS),
    ("t.add_(torch.repeat_interleave(n[:2], index).sum())", WAITS),
    ("t.add_(torch.normal(t, t + 1))", WAITS),
    ("t.add_(torch.linalg.inv(square).sum())", WAITS),
    ("t.add_(torch.linalg.svdvals(square).sum())", WAITS),
    ("t.add_(torch.histc(t, 4).sum())", WAITS),
)

#: Rows whose eager form Dynamo does not trace.
EAGER_ONLY: tuple[tuple[str, str], ...] = (("t[index[0]] = 3", WAITS), ("t.tolist()", WAITS), ("print(t)", WAITS))

#: Rows that torch 2.11 cannot capture, and a later one may learn to.
MAY_BE_CAPTURED = frozenset(
    {
        "t[index] = 4",
        "t2[index, 0] = 3",
        "t2[row_mask, row_mask] = 0",
        "t.masked_fill_(mask, n[0])",
        "t[0] = n.shape[0]",
    }
)

#: Rows that need a tensor on the host beside the capture device, so only a GPU tells.
ON_A_GPU: tuple[tuple[str, str], ...] = (
    ("t[host_index] = 4", COPIES),
    ("t.copy_(host)", COPIES),
    ("t.copy_(pinned)", COPIES),
    ('t.add_(torch.tensor([5], device="cuda"))', COPIES),
    ("t.add_(host.to(t.device))", COPIES),
    ("t[0] = host[0]", COPIES),
    ("t.add_(t.cpu().to(t.device))", WAITS),
    ("host[0] = 0", FINE),
    ("host[[1, 2]] = 4", FINE),
    ("t.add_(t * torch.tensor(2.0))", FINE),
)


def values(device: str | torch.device) -> dict[str, torch.Tensor]:
    """The tensors that the statements name, fresh ones."""
    beside = {}
    if torch.device(device).type == "cuda":
        # What only a GPU machine has: memory of its own for the host.
        host = torch.arange(8.0)
        beside = {"host": host, "pinned": host.pin_memory(), "host_index": torch.tensor([1, 2])}
    return beside | {
        "t": torch.arange(8.0, device=device),
        "t2": torch.ones(4, 4, device=device),
        "t0": torch.zeros((), device=device),
        "n": torch.arange(1.0, 4.0, device=device),
        "mask": torch.arange(8, device=device) > 3,
        "row_mask": torch.arange(4, device=device) > 1,
        "index": torch.tensor([1, 2], device=device),
        "square": torch.eye(4, device=device) * 2,
    }


def function_of(statement: str, names: list[str]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function of the named tensors that executes the statement and returns what it may have written."""
    body = statement.replace("[i, j]", "[1, 2]")
    source = f"def run({', '.join(names)}):\n    {body}\n    return t + 0, t2 + 0, t0 + 0\n"
    scope: dict[str, object] = {"torch": torch}
    exec(compile(source, f"<{statement}>", "exec"), scope)
    return scope["run"]  # type: ignore[return-value]


def run(statement: str, tensors: dict[str, torch.Tensor]) -> None:
    """Executes a statement of the table."""
    exec(compile(statement.replace("[i, j]", "[1, 2]"), "<statement>", "exec"), {"torch": torch, **tensors})
