# SPDX-License-Identifier: Apache-2.0
"""What sequence parallelism costs beside attention itself, on one device: all steps of all (virtual) ranks over one
monolithic call, and each fixed cost (merge, packing keys, heads to and from their messages) as bandwidth.

On a GPU 4 ranks hold 32K rows each, and the ring should stay within 1.05 of the one call. On a CPU the sizes are small,
the reference runs, and the figures claim nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import merge_partials, varlen_attention
from lrc_kernels.backend import use_backend
from lrc_kernels.sequence_parallel import SequencePlan, plan_sequence
from lrc_kernels.sequence_parallel.blocks import Task, pack_keys
from lrc_kernels.sequence_parallel.heads import head_tables
from lrc_kernels.sequence_parallel.op import gather_heads_op
from lrc_kernels.sequence_parallel.ulysses import scatter_heads
from lrc_kernels.sequence_parallel.virtual import virtual_attention

HEADS = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
SMALL_HEADS = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 32}
RANKS = 4
# Shares of the rows that each document has.
PACKS = {"one": (1.0,), "documents": (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)}


def plan_of(pack: str, device: torch.device, full_size: bool, **options: Any) -> SequencePlan:
    rows = RANKS * (32768 if device.type == "cuda" else 1024 if full_size else 96)
    lengths = [int(share * rows) for share in PACKS[pack]]
    lengths[0] += rows - sum(lengths)
    return plan_sequence(VarlenLayout(lengths, device), **{**(HEADS if full_size else SMALL_HEADS), **options})


def maker(plan: SequencePlan, rows: int, device: torch.device) -> Callable[[int], tuple[Tensor, ...]]:
    """q, k, v and dout of one input set, bf16."""

    def make(i: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(i)
        heads = (plan.num_heads, plan.num_kv_heads, plan.num_kv_heads, plan.num_heads)
        q, k, v, dout = (
            torch.randn(rows, number, plan.head_dim, device=device, dtype=torch.bfloat16, generator=generator)
            for number in heads
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    return make


def on_device(device: torch.device) -> Any:
    """On a CPU partial results in fp32 have the reference only."""
    return nullcontext() if device.type == "cuda" else use_backend("reference")


def both_passes(attend: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = attend(q, k, v)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    return run


@pytest.mark.parametrize("pack", list(PACKS))
@pytest.mark.parametrize(("arrangement", "transport"), [("zigzag", "ring"), ("balanced", "sparse")])
def test_all_steps_of_all_ranks(
    bench: Callable[..., Any], device: torch.device, full_size: bool, pack: str, arrangement: str, transport: str
) -> None:
    plan = plan_of(pack, device, full_size, ring=RANKS, arrangement=arrangement, transport=transport)
    make = maker(plan, plan.layout.num_tokens, device)
    one_call = both_passes(lambda q, k, v: varlen_attention(q, k, v, cu_seqlens_q=plan.layout))
    with on_device(device):
        wanted = [x.double() for x in one_call(*make(0))]

        def check(result: tuple[Tensor, ...]) -> None:
            for x, y in zip(result, wanted, strict=True):
                assert (x.double() - y).norm() <= 2e-2 * y.norm()

        pairs = sum(n * (n + 1) // 2 for n in plan.layout.lengths)
        bench(
            both_passes(lambda q, k, v: virtual_attention(q, k, v, plan)),
            bytes_moved=4 * sum(x.nbytes for x in make(0)) // 2,
            flops=14 * plan.num_heads * plan.head_dim * pairs,
            check=check,
            make_inputs=make,
            peers={"one_call": one_call},
            backend=None if device.type == "cuda" else "reference",
            op="ring attention, forward + backward, all ranks",
            shape=f"{plan.layout.num_tokens} rows, {RANKS} ranks, {pack}",
            arrangement=arrangement,
            transport=transport,
        )


def test_merge(bench: Callable[..., Any], device: torch.device, full_size: bool) -> None:
    plan = plan_of("one", device, full_size, ring=RANKS)
    rows, heads = plan.local_rows(0), plan.num_heads

    def make(i: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(i)
        draw = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
        out, block = draw(rows, heads, plan.head_dim), draw(rows, heads, plan.head_dim)
        return out, draw(heads, rows), block, draw(heads, rows)

    def check(result: tuple[Tensor, Tensor]) -> None:
        out, lse, block, lse_block = (x.double() for x in make(0))
        merged = torch.logaddexp(lse, lse_block)
        wanted = out * (lse - merged).exp().T[..., None] + block * (lse_block - merged).exp().T[..., None]
        torch.testing.assert_close(result[0].double(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result[1].double(), merged, rtol=1e-5, atol=1e-5)

    with on_device(device):
        bench(merge_partials, bytes_moved=3 * sum(x.nbytes for x in make(0)) // 2, check=check, make_inputs=make,
              backend=None if device.type == "cuda" else "reference", op="merge", shape=f"{rows} rows")  # fmt: skip


@pytest.mark.parametrize("ulysses", [1, RANKS])
def test_messages(bench: Callable[..., Any], device: torch.device, full_size: bool, ulysses: int) -> None:
    """Packing K|V for the ring (ulysses 1), and Q|K|V by heads for the all-to-all: one read and one write."""
    plan = plan_of("one", device, full_size, ring=RANKS // ulysses, ulysses=ulysses)
    task = Task(plan, 0, 0, 1.0, False, torch.float32)
    make = maker(plan, plan.local_rows(0), device)

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Tensor:
        with torch.no_grad():
            return pack_keys(k, v, None) if ulysses == 1 else scatter_heads(task, [q], [k, v]).send(None).tensor

    def check(message: Tensor) -> None:
        q, k, v, _ = make(0)
        sent = [k, v] if ulysses == 1 else [q, k, v]
        assert message.numel() == sum(x.numel() for x in sent)
        total = sum(x.double().sum() for x in sent)
        assert (message.double().sum() - total).abs() <= 1e-6 * message.numel()

    sent = make(0)[1:3] if ulysses == 1 else make(0)[:3]
    bench(run, bytes_moved=2 * sum(x.nbytes for x in sent), check=check, make_inputs=make,
          backend="reference" if ulysses > 1 and device.type == "cpu" else None,
          op="pack keys" if ulysses == 1 else "scatter heads", shape=f"{plan.local_rows(0)} rows")  # fmt: skip


def test_gather_heads(bench: Callable[..., Any], device: torch.device, full_size: bool) -> None:
    """What an all-to-all of heads brought, back to rows of all heads: one read and one write."""
    plan = plan_of("one", device, full_size, ring=1, ulysses=RANKS)
    rows, heads = plan.local_rows(0), plan.heads.num_q
    table = head_tables(plan.num_heads, plan.num_kv_heads, RANKS, 1, 0, device).gather

    def make(i: int) -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(i)
        shape = (RANKS, rows, heads, plan.head_dim)
        return (torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator),)

    def permute(parts: Tensor) -> Tensor:
        return parts.movedim(0, 1).flatten(1, 2).contiguous()

    bench(lambda parts: gather_heads_op(parts, table, [plan.num_heads], parts.dtype)[0],
          bytes_moved=2 * make(0)[0].nbytes, check=lambda out: torch.testing.assert_close(out, permute(*make(0))),
          make_inputs=make, peers={"permute": permute}, backend=None if device.type == "cuda" else "reference",
          op="gather heads", shape=f"{rows} rows")  # fmt: skip
