"""The table of what ops do with dimensions, against what torch's ops compute."""

from __future__ import annotations

import pytest
import torch

from pcg_compile.fx.facts import OpCalls, arguments_of, tensors_in
from pcg_compile.passes.dimension_maps import MAPPED, map_of
from pcg_compile.passes.padding_safety.rules import packet_of

pytest.importorskip("expecttest", reason="torch's database of ops needs expecttest")
from torch.testing._internal.common_methods_invocations import op_db

#: Ops of PyTorch's database that dispatch what the table knows.
CHOSEN = (
    "sum", "mean", "amax", "prod", "any", "argmax", "logsumexp", "linalg.vector_norm", "std", "var_mean", "median",
    "mode", "kthvalue", "topk", "sort", "argsort", "softmax", "log_softmax", "nn.functional.layer_norm",
    "nn.functional.group_norm", "renorm", "flip", "roll", "rot90", "split", "unbind", "chunk", "nn.functional.pad",
    "unfold", "nn.functional.avg_pool2d", "nn.functional.max_pool2d", "nn.functional.avg_pool1d",
    "nn.functional.pixel_shuffle", "nn.functional.interpolate", "permute", "transpose", "t", "expand",
    "view_as_complex", "tensor_split"
)  # fmt: skip
OPS = [op for op in op_db if op.name in CHOSEN]


def calls_of(op):
    """The calls of the table's ops that a few samples dispatch."""
    torch.manual_seed(0)
    found = []
    for _, sample in zip(range(12), op.sample_inputs("cpu", torch.float32, requires_grad=False)):
        calls = []
        with torch.no_grad(), OpCalls(calls, keep_results=True):
            op(sample.input, *sample.args, **sample.kwargs)
        found += [call for call in calls if packet_of(call.op) in MAPPED and call.op.namespace == "aten"]
    return found


def agrees(call):
    """Changes one entry of the first tensor: a result may change only at that entry's index, where the map says so."""
    given = arguments_of(call.op, call.args, call.kwargs)
    source = next(tensors_in((call.args, dict(call.kwargs))))
    results = list(tensors_in(call.result))
    if not source.numel() or not source.is_floating_point():
        return False
    found = map_of(packet_of(call.op), given, list(source.shape), [list(r.shape) for r in results])
    # Another index in each dimension, so a result that has them swapped shows.
    place = tuple(min(i + 1, size - 1) for i, size in enumerate(source.shape))
    changed = source.clone()
    changed[place] += 7.0
    args = [changed if a is source else a for a in call.args]
    kwargs = {k: changed if v is source else v for k, v in call.kwargs.items()}
    with torch.no_grad():
        after = list(tensors_in(call.op(*args, **kwargs)))
    for before, now, dims in zip(results, after, found.results, strict=True):
        assert len(dims) == before.dim()
        for index in torch.nonzero((before != now) & ~(before.isnan() & now.isnan())).tolist():
            for i, dim in zip(index, dims, strict=True):
                if dim is not None and dim not in found.reads:
                    assert i == place[dim], f"{call.op}: entry {place} reaches {index}"
    return True


@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}.{op.variant_test_name}".strip("."))
def test_entries_stay_where_the_table_says(op):
    calls = calls_of(op)
    agreed = [agrees(call) for call in calls]
    assert any(agreed) or not calls


def test_the_table_is_met():
    """Most of the chosen ops dispatch one of the table's: the test above is not empty."""
    met = {packet_of(call.op) for op in OPS for call in calls_of(op)}
    assert len(met) >= 25, sorted(met)
