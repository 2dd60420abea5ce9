"""PyTorch's own database of ops, each as a function through the backend, static and at changing sizes, against eager.

CI runs a fixed tenth. ``PCG_NIGHTLY=1`` runs all of it, ``PCG_COMPILER=inductor`` with Inductor. What is left out, and
why, is in op_db_exclusions.txt; ``python tests/test_op_db.py`` writes that list and the one of what passes now.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves

import pcg_compile  # noqa: F401 - registers the backend

HERE = Path(__file__).parent
COMPILER = os.environ.get("PCG_COMPILER", "eager")
NIGHTLY = os.environ.get("PCG_NIGHTLY") == "1"
DTYPES = (torch.float32, torch.int64, torch.bool, torch.complex64)
#: Samples of an op that are tried.
SAMPLES = 3


def name_of(op):
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def excluded():
    lines = (HERE / "op_db_exclusions.txt").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def samples_of(op):
    dtype = next((d for d in DTYPES if op.supports_dtype(d, "cpu")), None)
    if dtype is None:
        return []
    torch.manual_seed(0)
    found = []
    for i, sample in enumerate(op.sample_inputs("cpu", dtype, requires_grad=False)):
        if i == SAMPLES:
            break
        found.append((sample.input, sample.args, sample.kwargs))
    return found


def call_of(op, spec_of):
    """The op as a function of the sample's tensors; everything else stays as it is."""
    leaves, spec = tree_flatten(spec_of)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def call(*tensors):
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        first, args, kwargs = torch.utils._pytree.tree_unflatten(filled, spec)
        return op(first, *args, **kwargs)

    return call, [leaves[i] for i in places]


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def run(function, tensors):
    torch.manual_seed(1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*tensors)


def same(got, want):
    ours, theirs = tree_leaves(got), tree_leaves(want)
    assert len(ours) == len(theirs), f"{len(ours)} results, eager gives {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, torch.Tensor):
            assert a.shape == b.shape, f"shape {list(a.shape)}, eager gives {list(b.shape)}"
            if b.layout == torch.strided and b.numel():
                torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)
        else:
            assert a == b or (a != a and b != b)


def compare(function, tensors, backend, **options):
    """At the sample's size; then, where it can be, with the leading dimension cut, so it becomes dynamic."""
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, **options)
    same(run(compiled, copies(tensors)), run(function, copies(tensors)))
    for less in (1, 2):
        cut = [t[: t.shape[0] - less] if t.dim() and t.shape[0] > less + 1 else t for t in tensors]
        try:
            want = run(function, copies(cut))
        except Exception:
            return
        same(run(compiled, copies(cut)), want)


def check(op):
    for sample in samples_of(op):
        function, tensors = call_of(op, sample)
        compare(function, tensors, "pcg", options={"compiler": COMPILER, "buckets": [2, 4, 8, 16, 32]})


def ops():
    known = excluded() if (HERE / "op_db_exclusions.txt").exists() else {}
    chosen = [op for op in op_db if name_of(op) not in known]
    return chosen if NIGHTLY else [op for op in chosen if zlib.crc32(name_of(op).encode()) % 10 == 0]


@pytest.mark.parametrize("op", ops() if __name__ != "__main__" else [], ids=name_of)
def test_op(op, caplog):
    caplog.set_level(logging.CRITICAL)
    check(op)


def why_out(op):
    """Why an op is no test of this backend: eager or AOTAutograd alone cannot, or its result is random."""
    try:
        samples = samples_of(op)
        if not samples:
            return "no samples of the dtypes tried"
        for sample in samples:
            function, tensors = call_of(op, sample)
            one, other = run(function, copies(tensors)), run(function, copies(tensors))
            same(other, one)
    except Exception as error:
        return f"eager: {short(error)}"
    try:
        for sample in samples:
            function, tensors = call_of(op, sample)
            compare(function, tensors, "aot_eager")
    except Exception as error:
        return f"aot_eager: {short(error)}"
    return None


def short(error):
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:100]}"


def main():
    """Writes both lists; prints what fails here alone."""
    logging.disable(logging.CRITICAL)
    passes, out, failed = [], [], []
    for op in op_db:
        name = name_of(op)
        try:
            check(op)
            passes.append(name)
        except Exception as error:
            reason = why_out(op)
            (out if reason else failed).append(f"{name}: {reason or short(error)}")
    head = "# Ops of PyTorch's database that"
    for file, title, lines in (
        ("op_db_exclusions.txt", f"{head} are no test of this backend, and why.", out),
        ("op_db_passes.txt", f"{head} give eager's values, static and at changing sizes.", passes),
    ):
        made = f"{title} Torch {torch.__version__}, compiler {COMPILER}; by: python tests/test_op_db.py"
        (HERE / file).write_text("\n".join([made, *sorted(lines), ""]))
    print(f"{len(passes)} pass, {len(out)} are left out", *failed, sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
