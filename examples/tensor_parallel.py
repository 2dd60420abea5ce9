"""A Llama in parts on several processes: PyTorch splits it, pcg captures each rank's pieces.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Runs on gloo and CPUs where there are fewer GPUs than processes, else on NCCL with a GPU for each.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, LlamaConfig

import pcg_compile as pcg
import pcg_compile.integrations.transformers

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
CUDA = torch.cuda.device_count() >= RANKS
DEVICE = torch.device("cuda", RANK) if CUDA else torch.device("cpu")
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8}
CONFIG = LlamaConfig(**(SHAPE if CUDA else SMALL), num_key_value_heads=8, vocab_size=1000)
COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")


def main() -> None:
    """Serves a few batches, whole on one process and in parts, and prints what each step took."""
    if CUDA:
        torch.cuda.set_device(DEVICE)
    # A rank that dies is an error on the others after this time, not a hang.
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)  # the same weights on every rank
    dtype = torch.bfloat16 if CUDA else torch.float32
    with DEVICE:  # where random numbers for billions of weights are made in seconds
        model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="pcg", dtype=dtype).eval()
    heads = CONFIG.num_key_value_heads
    sizes = {"num_layers": CONFIG.num_hidden_layers, "num_pages": 64, "head_dim": CONFIG.head_dim}
    batches = [([5, 9, 3], [5, 9, 3]), ([1, 1, 1], [6, 10, 4]), ([1, 1, 4], [7, 11, 8]), ([1, 1, 1], [8, 12, 9])]

    def serve(call, kv_heads: int, warm_up: bool = False) -> list[tuple[int, float, torch.Tensor]]:
        cache = pcg.PagedKVCache(**sizes, num_kv_heads=kv_heads, dtype=dtype, device=DEVICE)
        pages, steps = [cache.allocate(1) for _ in range(3)], []
        if warm_up:  # one compile for all sizes, and a captured graph for each bucket, on all ranks alike
            batch = pcg.Batch(*batches[0], pages)
            ids = torch.zeros(1, batch.num_tokens, dtype=torch.long, device=DEVICE)
            with pcg.step(batch, cache):
                inputs = {"input_ids": ids, "position_ids": batch.positions[None]}
                pcg.warmup(call, **inputs, buckets=[4, 8, 32], progress=RANK == 0)
        for qo_lens, kv_lens in batches:
            batch = pcg.Batch(qo_lens, kv_lens, pages)
            ids = torch.arange(batch.num_tokens, device=DEVICE)[None] % 1000
            started = time.perf_counter()
            with pcg.step(batch, cache):
                logits = call(input_ids=ids, position_ids=batch.positions[None]).logits[0].float()
            steps.append((batch.num_tokens, time.perf_counter() - started, logits.cpu()))
        return steps

    whole = serve(model, heads)
    plan = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
    mesh = init_device_mesh(DEVICE.type, (RANKS,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    compiled = torch.compile(model, backend="pcg", options={"compiler": "inductor" if CUDA else "eager"})
    parts = serve(compiled, heads // RANKS, warm_up=True)
    if RANK == 0:
        for (n, before, want), (_, after, got) in zip(whole, parts, strict=True):
            difference = (want - got).abs().max().item()
            times = f"{1e3 * before:7.2f} ms whole, {1e3 * after:7.2f} ms in parts"
            print(f"{n:3d} tokens: {times}, differ {difference:.1e}")
            assert difference < (0.5 if CUDA else 1e-3)
        stats = pcg.stats(compiled)
        print(f"{stats.pieces} pieces, {stats.captured} captured graphs, {stats.replays} replays", stats.fallbacks)
    dist.barrier()
    pcg.release_collectives()  # NCCL waits for captured graphs that use a communicator
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
