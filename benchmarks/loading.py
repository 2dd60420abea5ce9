"""Launches and host time of loading a step's inputs into static memory: ``python -m benchmarks.loading``.

For each set of inputs one line: how many kernels a load launches (on a GPU; calls on a CPU) where the step fills its
bucket, and where its inputs are padded, and the host's time of each, in microseconds.
"""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import pcg_compile as pcg
from pcg_compile.registry import runtimes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, device=DEVICE)


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


#: Inputs of ``n`` tokens, or of ``n`` sequences of ``m`` tokens, and their dynamic dimensions.
SETS: dict[str, tuple[Any, Any]] = {
    "ids": (lambda n, m: [_ids(n)], 0),
    "ids, positions": (lambda n, m: [_ids(n), _ids(n)], 0),
    "ids, positions, embeddings [n, 2048]": (lambda n, m: [_ids(n), _ids(n), _floats(n, 2048)], 0),
    "six of ids": (lambda n, m: [_ids(n) for _ in range(6)], 0),
    "ids, mask, types [n, m]": (lambda n, m: [_ids(n, m) for _ in range(3)], (0, 1)),
    "ids, mask, types, positions [n, m]": (lambda n, m: [_ids(n, m) for _ in range(4)], (0, 1)),
    "ids [n, m], large": (lambda n, m: [_ids(n, 4 * m)], (0, 1)),
    "ids, mask [n, m], large": (lambda n, m: [_ids(n, 4 * m) for _ in range(2)], (0, 1)),
    "ids, mask, types [n, m], large": (lambda n, m: [_ids(n, 4 * m) for _ in range(3)], (0, 1)),
    "ids, mask, types, positions [n, m], large": (lambda n, m: [_ids(n, 4 * m) for _ in range(4)], (0, 1)),
}


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = ("narrow", "slice", "view", "expand", "alias", "detach", "select")
        self.count += not any(f"aten.{name}." in str(func) for name in views)
        return func(*args, **(kwargs or {}))


def _launches(load: Any) -> int:
    if DEVICE == "cpu":
        with _Calls() as calls:
            load()
        return calls.count
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        load()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _host_us(load: Any, repeats: int = 300) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        load()
        times.append(time.perf_counter() - started)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    return 1e6 * sorted(times)[repeats // 2]


def main() -> None:
    """Prints a table."""
    print(f"{'inputs':41} {'full':>5} {'us':>6} {'padded':>7} {'us':>6}")
    for name, (make, dims) in SETS.items():
        torch._dynamo.reset()
        count = len(make(2, 2))
        arguments = [f"x{i}" for i in range(count)]
        scope: dict[str, Any] = {}
        ranks = 1 if dims == 0 else 2
        alike = "; ".join(f"torch._check({x}.shape[{d}] == x0.shape[{d}])" for x in arguments[1:] for d in range(ranks))
        results = ", ".join(f"{x} + 1" for x in arguments)
        exec(f"def function({', '.join(arguments)}):\n {alike or 'pass'}\n return {results}", {"torch": torch}, scope)
        dynamic = dict.fromkeys(arguments, dims)
        compiled = pcg.piecewise(dynamic=dynamic, buckets=[64, 256], max_padding=10, compiler="eager")(
            scope["function"]
        )
        row = []
        with torch.inference_mode():
            for n, m in ((64, 64), (50, 41)):
                given = make(n, m)
                compiled(*given)
                (runtime,) = runtimes(compiled)
                sizes = set(given[0].shape) if dims else {n}
                program = next(p for key, p in runtime.bindings[0].steps.items() if set(key) == sizes)
                # Dynamo calls the first one l_x0_, or l_args_0_ where it wraps the function.
                users = [s for s in runtime.plan.inputs if s.kind == "user"]
                arguments_of = {int(re.sub(r"\D", "", s.node.name)): s.position for s in users}
                args: list[Any] = [None] * (1 + max(s.position for s in runtime.plan.inputs))
                for i, tensor in enumerate(given):
                    args[arguments_of[i]] = tensor
                load = lambda program=program, args=args: program.load(args)
                load()
                row += [_launches(load), _host_us(load)]
        print(f"{name:41} {row[0]:5} {row[1]:6.1f} {row[2]:7} {row[3]:6.1f}", flush=True)


if __name__ == "__main__":
    main()
