"""``python -m benchmarks <command>``."""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from collections.abc import Sequence

from .common import add_common, resolve

_COMMANDS = {
    "host": "host time: glue, entry, metadata (needs no GPU)",
    "padding": "waste of the default buckets; padding by a request against slices",
    "step": "one step: eager, torch.compile, pcg, a full-graph CUDA graph",
    "serve": "decode loops that read tokens at once, one step late, never",
    "capture": "seconds and MiB a bucket",
    "memory": "MiB that warming up takes, beside breakable-cuda-graphs (needs a GPU)",
    "crossover": "the size from which on a captured graph no longer pays",
    "startup": "time to the first step, cold and warm caches",
    "soak": "random traffic, compared with eager as it goes",
    "tensor_parallel": "a model in parts: pcg against eager, and against one GPU",
    "attention": "paged attention in a CUDA graph: Triton, FlashInfer, the floor (needs a GPU)",
    "attention_check": "attention kernels against float64 on random batches, by feature (needs a GPU)",
    "lora_kernels": "the LoRA kernels against the floor (needs a GPU)",
    "lora": "a step with many adapters: pcg with and without, PEFT's mixed batches",
    "encoder": "embeddings of real sentences: eager, torch.compile, reduce-overhead, pcg",
    "throughput": "new tokens a second: generate_batch, transformers' own, generate with a static cache",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Reads a command line, the process's by default, and runs what it names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Benchmarks of pcg.")
    commands = parser.add_subparsers(dest="command", required=True)
    modules = {name: importlib.import_module(f".{name}", __package__) for name in _COMMANDS}
    for name, about in _COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about)
        add_common(command)
        modules[name].add_arguments(command)
        command.set_defaults(run=modules[name].run)
    everything = commands.add_parser("all", help="all of them, one after the other", description="All benchmarks.")
    add_common(everything)
    report = commands.add_parser("report", help="tables and plots of results that exist")
    importlib.import_module(".report", __package__).add_arguments(report)
    chart = commands.add_parser("chart", help="the README's chart, from results that exist")
    importlib.import_module(".chart", __package__).add_arguments(chart)
    args = parser.parse_args(argv)
    if args.command in ("report", "chart"):
        args.run(args)
        return
    if args.command != "all":
        print(f"==> {args.command}", flush=True)
        args.run(resolve(args))
        return
    shared = [f"--{k}" if v is True else f"--{k}={v}" for k, v in vars(args).items() if k != "command" and v]
    failed = []
    for name in _COMMANDS:
        print(f"==> {name}", flush=True)
        started = time.perf_counter()
        try:
            one = parser.parse_args([name, *shared])
            one.run(resolve(one))
        except (Exception, SystemExit):
            traceback.print_exc()
            failed.append(name)
        print(f"    {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
