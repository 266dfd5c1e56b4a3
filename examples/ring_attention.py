# SPDX-License-Identifier: Apache-2.0
"""Attention over one pack on several processes, checked against full attention on one.

`torchrun --nproc-per-node 4 examples/ring_attention.py` (gloo on CPU, NCCL on GPUs) prints the errors and the bytes
moved, and exits 0 where the errors are small. A rank that dies or stalls ends it within --timeout, with its number.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta

import torch
from torch import Tensor, distributed

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.sequence_parallel import make_mesh, plan_sequence, sequence_parallel_attention, shard, unshard
from lrc_kernels.sequence_parallel.mesh import ranks_of

# Errors that rounding explains, relative to the norm of the result.
BOUNDS = {"float64": 1e-14, "float32": 5e-6, "bfloat16": 2e-2}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[700, 1, 350, 0, 90, 500, 3, 404])
    parser.add_argument("--ulysses", type=int, default=1, help="ulysses degree; the ring takes the other ranks")
    parser.add_argument("--placement", default="head_first", choices=("head_first", "context_first"))
    parser.add_argument("--arrangement", default="auto")
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--heads", type=int, nargs=2, default=(8, 2), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=sorted(BOUNDS), help="default: float32 on CPU, bfloat16 on GPUs")
    parser.add_argument("--rounds", type=int, default=1, help="repeat, to have time to kill a rank")
    parser.add_argument("--timeout", type=float, default=60, help="seconds that a rank may keep the others waiting")
    return parser.parse_args()


def main() -> int:
    options = parse()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=options.timeout))
    try:
        return run(options, device)
    finally:
        # A broken group is left alone: to take it down would wait for the rank that is gone.
        if sys.exc_info()[0] is None:
            distributed.destroy_process_group()


def run(options: argparse.Namespace, device: torch.device) -> int:
    world, rank = distributed.get_world_size(), distributed.get_rank()
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    num_heads, num_kv_heads = options.heads
    ring = world // options.ulysses
    mesh = make_mesh(device.type, ring=ring, ulysses=options.ulysses, placement=options.placement)
    layout = VarlenLayout(options.lengths, device)
    plan = plan_sequence(layout, ring=ring, ulysses=options.ulysses, num_heads=num_heads, num_kv_heads=num_kv_heads,
                         head_dim=options.head_dim, arrangement=options.arrangement,
                         transport=options.transport)  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    *whole, dout = (
        torch.randn(layout.num_tokens, heads, options.head_dim, generator=draw).to(device, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    ranks = ranks_of(mesh)
    for number in range(options.rounds):
        sent = ranks.bytes_sent
        local = [shard(x, plan, mesh).requires_grad_() for x in whole]
        out = sequence_parallel_attention(*local, plan, mesh)
        out.backward(shard(dout, plan, mesh))
        sent = ranks.bytes_sent - sent
        if options.rounds > 1 and rank == 0:
            print(f"round {number + 1} of {options.rounds}", flush=True)
    results = [unshard(x, plan, mesh) for x in (out.detach(), *(x.grad for x in local))]
    total = torch.tensor(sent, device=device)
    distributed.all_reduce(total)
    errors = compare(whole, dout, layout, results)
    worst, bound = max(errors.values()), BOUNDS[str(dtype).removeprefix("torch.")]
    if rank == 0:
        stats = plan.stats()
        print(f"{layout.num_tokens} rows of {layout.num_sequences} documents on {world} ranks "
              f"(ring {ring}, ulysses {options.ulysses}), {device.type}, {dtype}")  # fmt: skip
        print(f"arrangement {plan.arrangement}, transport {plan.transport}: imbalance {stats.imbalance:.3f}, "
              f"padding {stats.padding:.2%}")  # fmt: skip
        print("relative errors against full attention: " + ", ".join(f"{k} {e:.2e}" for k, e in errors.items()))
        print(f"bytes moved by all ranks, forward and backward: {int(total):,}")
        print("ok" if worst <= bound else f"FAILED: an error exceeds {bound:.0e}")
    return 0 if worst <= bound else 1


def compare(whole: list[Tensor], dout: Tensor, layout: VarlenLayout, results: list[Tensor]) -> dict[str, float]:
    """Relative Frobenius errors of out, dq, dk, dv against full attention in fp64 (on the CPU) on this process."""
    exact = [x.detach().cpu().double().requires_grad_() for x in whole]
    wanted = varlen_attention(*exact, cu_seqlens_q=layout.to("cpu"))
    assert isinstance(wanted, Tensor)
    wanted.backward(dout.cpu().double())
    pairs = zip(("out", "dq", "dk", "dv"), results, (wanted.detach(), *(x.grad for x in exact)), strict=True)
    return {name: ((x.cpu().double() - y).norm() / y.norm()).item() for name, x, y in pairs if y is not None}


if __name__ == "__main__":
    sys.exit(main())
