# SPDX-License-Identifier: Apache-2.0
"""Causal attention at the sizes of long-video prefill and training: our kernel, every other backend that can run beside
it, and attention as public code writes it out.

FLOPs are those of the pairs that a causal mask leaves: 4 Hq K per pair forward (two products), 10 more backward (five).
Bytes are the fewest that the task needs: each input read and each output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import attention as peers
from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.backend import ORDER, use_backend
from lrc_kernels.testing.tolerance import assert_close

# id: tokens on a GPU, on a CPU with --full-size, on a CPU.
TOKENS = {"8k": (8192, 512, 64), "16k": (16384, 1024, 96), "49k": (49152, 1536, 128), "160k": (163840, 2048, 192)}
HEADS = {"28/4/128": (28, 4, 128), "32/8/128": (32, 8, 128)}
# Shares of the tokens that each document of a pack has.
PACKS = {"one": (1.0,), "documents": (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)}
DTYPE = torch.bfloat16
SAMPLES = 32


class Case:
    """One pack: its sizes, its input sets, and the exact values of a sample of rows of the result."""

    def __init__(self, tokens: str, heads: str, pack: str, device: torch.device, full_size: bool):
        on_gpu, on_cpu, small = TOKENS[tokens]
        self.tokens = on_gpu if device.type == "cuda" else on_cpu if full_size else small
        self.heads, self.kv_heads, self.head_dim = HEADS[heads]
        if not full_size:
            self.heads, self.kv_heads, self.head_dim = self.heads // 4, self.kv_heads // 4, 32
        lengths = [int(share * self.tokens) for share in PACKS[pack]]
        lengths[0] += self.tokens - sum(lengths)
        self.layout, self.device = VarlenLayout(lengths, device), device
        self.pairs = sum(n * (n + 1) // 2 for n in lengths)

    def make(self, i: int) -> tuple[Tensor, ...]:
        """q, k, v with gradients, and dout."""
        generator = torch.Generator(self.device).manual_seed(i)
        draw = lambda heads: torch.randn(  # noqa: E731
            self.tokens, heads, self.head_dim, device=self.device, dtype=DTYPE, generator=generator
        )
        q, k, v = (draw(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads))
        return q, k, v, draw(self.heads)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Tensor:
        with torch.no_grad():
            return varlen_attention(q, k, v, cu_seqlens_q=self.layout)

    def forward_backward(self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out = varlen_attention(q, k, v, cu_seqlens_q=self.layout)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)

    def peer(self, attend: Callable[..., Tensor], backward: bool) -> Callable[..., Any]:
        def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Any:
            with torch.set_grad_enabled(backward):
                out = attend(q, k, v, self.layout.lengths)
            return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout)) if backward else out

        return run

    def sample(self) -> list[tuple[int, int]]:
        """(row, first row of its document), spread over the pack, the first and last row of all among them."""
        starts = self.layout.cu_seqlens.cpu()
        rows = torch.linspace(0, self.tokens - 1, SAMPLES).long()
        return [(int(row), int(starts[torch.searchsorted(starts, row, right=True) - 1])) for row in rows]

    def exact(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """out and dq of the sampled rows of input set 0, in `dtype` throughout: [SAMPLES, Hq, K] each."""
        q, k, v, dout = (x.detach() for x in self.make(0))
        ratio, scale = self.heads // self.kv_heads, self.head_dim**-0.5
        outs, gradients = [], []
        for row, first in self.sample():
            q_hk, dout_hk = q[row].to(dtype), dout[row].to(dtype)
            k_hjk, v_hjk = (x[first : row + 1].to(dtype).transpose(0, 1).repeat_interleave(ratio, 0) for x in (k, v))
            p = ((k_hjk @ q_hk[..., None])[..., 0] * scale).softmax(-1)
            out = (p[:, None] @ v_hjk)[:, 0]
            ds = p * ((v_hjk @ dout_hk[..., None])[..., 0] - (dout_hk * out).sum(-1, keepdim=True))
            outs.append(out)
            gradients.append((ds[:, None] @ k_hjk)[:, 0] * scale)
        return torch.stack(outs), torch.stack(gradients)

    def exact_keys(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """dk and dv of the last keys of each document, which few rows see, in `dtype` throughout: [keys, Hkv, K]."""
        q, k, v, dout = (x.detach() for x in self.make(0))
        ratio, scale = self.heads // self.kv_heads, self.head_dim**-0.5
        results: list[tuple[Tensor, Tensor]] = []
        for first, rows in self.last_keys():
            dk, dv = (torch.zeros(len(rows), self.heads, self.head_dim, dtype=dtype, device=q.device) for _ in range(2))
            for row in rows:
                q_hk, dout_hk = q[row].to(dtype), dout[row].to(dtype)
                k_hjk, v_hjk = (
                    x[first : row + 1].to(dtype).transpose(0, 1).repeat_interleave(ratio, 0) for x in (k, v)
                )
                p = ((k_hjk @ q_hk[..., None])[..., 0] * scale).softmax(-1)
                dp = (v_hjk @ dout_hk[..., None])[..., 0]
                ds = p * (dp - (p * dp).sum(-1, keepdim=True))
                seen = row + 1 - rows[0]
                dv[:seen] += p[:, -seen:].T[..., None] * dout_hk
                dk[:seen] += ds[:, -seen:].T[..., None] * q_hk * scale
            results.append(tuple(x.unflatten(1, (self.kv_heads, ratio)).sum(2) for x in (dk, dv)))  # type: ignore
        dks, dvs = zip(*results, strict=True)
        return torch.cat(dks), torch.cat(dvs)

    def last_keys(self) -> list[tuple[int, list[int]]]:
        """(first row, last rows) of documents at both ends of the pack."""
        ends = self.layout.cu_seqlens.tolist()
        documents = [(a, list(range(max(a, b - 6), b))) for a, b in pairwise(ends) if b > a]
        return documents[:2] + documents[2:][-2:]

    def check(self, backward: bool) -> Callable[[Any], None]:
        """out and dq row by row against fp64; dk and dv by what every row gives them in sum."""
        exact, same_dtype = self.exact(torch.float64), self.exact(DTYPE)
        rows = [row for row, _ in self.sample()]
        keys = [row for _, last in self.last_keys() for row in last]
        if backward:
            exact_keys, same_keys = self.exact_keys(torch.float64), self.exact_keys(DTYPE)

        def check(result: Any) -> None:
            out, *gradients = result if backward else (result,)
            assert_close(out[rows], exact[0], same_dtype[0], name="out")
            if not backward:
                return
            dq, dk, dv = gradients
            assert_close(dq[rows], exact[1], same_dtype[1], name="dq")
            for name, got, wanted, same in zip(("dk", "dv"), (dk, dv), exact_keys, same_keys, strict=True):
                assert_close(got[keys], wanted, same, name=name)
            q, k, _, dout = (x.detach() for x in self.make(0))
            # Each row of P sums to 1, so dv sums to dout over all rows; sum(q dq) and sum(k dk) are both sum(dS S).
            total, wanted = dv.double().sum((0, 1)), dout.double().sum((0, 1))
            assert (total - wanted).norm() <= 2e-2 * (self.tokens * self.heads * self.head_dim) ** 0.5
            left, right = (q.double() * dq.double()).sum(), (k.double() * dk.double()).sum()
            size = (q.double().norm() * dq.double().norm()) + (k.double().norm() * dk.double().norm())
            assert (left - right).abs() <= 2e-2 * size

        return check


def forced(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> Any:
        with use_backend(name):
            return run(*inputs)

    return call


def takes(run: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
    """Whether a forced backend takes the call; what it raises otherwise is not hidden."""
    try:
        run(*inputs)
    except RuntimeError as error:
        if "was forced but cannot take this call" not in str(error):
            raise
        return False
    return True


def fits(nbytes: int, device: torch.device) -> bool:
    """Whether scores of `nbytes` fit beside all else; on a CPU they should not be all that is measured."""
    return nbytes < (torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30)


@pytest.mark.parametrize("pass_", ["forward", "forward_backward"])
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention(bench, device, full_size, tokens, heads, pack, pass_):
    case = Case(tokens, heads, pack, device, full_size)
    backward = pass_ == "forward_backward"
    run = case.forward_backward if backward else case.forward
    ours = "triton" if device.type == "cuda" else "cpu"
    others = {name: forced(name, run) for name in ORDER if name not in (ours, "reference")}
    contestants = {name: call for name, call in others.items() if takes(call, case.make(0))}
    contestants["torch_best"] = case.peer(peers.torch_best, backward)
    if fits(peers.published_bytes(case.heads, case.layout.lengths, DTYPE.itemsize), device):
        contestants["published"] = case.peer(peers.published, backward)
    rows_q, rows_k = case.tokens * case.heads * case.head_dim, case.tokens * case.kv_heads * case.head_dim
    # Forward: q, k, v, out. Backward: these, dout, dq, dk, dv. Either writes or reads the lse, 4 bytes.
    elements = 2 * rows_q + 2 * rows_k + backward * (4 * rows_q + 4 * rows_k)
    record = bench(
        forced(ours, run),
        bytes_moved=elements * DTYPE.itemsize + (1 + backward) * case.tokens * case.heads * 4,
        flops=(14 if backward else 4) * case.pairs * case.heads * case.head_dim,
        check=case.check(backward),
        make_inputs=case.make,
        peers=contestants,
        backend=ours,
        op="attention",
        shape=f"{tokens} {heads} {pack}",
        tokens=case.tokens,
        dtype="bf16",
        **{"pass": pass_},
    )
    assert record["backend"] == ours
