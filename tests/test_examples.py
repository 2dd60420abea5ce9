"""The examples run as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))


def run(*arguments, timeout=240):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=EXAMPLES.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_quickstart():
    printed = run(EXAMPLES / "quickstart.py", "--compiler", "eager")
    assert "request of 33 tokens: 12 of 12 tokens equal generate()'s" in printed
    assert "no fallback" in printed and "Next: docs/quickstart.md" in printed
    # Times of static replays would be noise.
    assert ("speed-up" in printed) == ("eager ms" in printed) == torch.cuda.is_available()


def test_many_adapters():
    assert "0 new captured graphs" in run(EXAMPLES / "many_adapters.py")


def test_tensor_parallel():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run(*torchrun, EXAMPLES / "tensor_parallel.py")
    assert "7 pieces" in out and out.count("ms in parts") == 4


def test_continuous_batching():
    printed = run(EXAMPLES / "continuous_batching.py", "--requests", "6", "--check")
    assert len(re.findall(r"^req_\d:(?: \d+){16}$", printed, re.M)) == 6
    assert "6 of 6 answers equal those of requests generated alone" in printed
