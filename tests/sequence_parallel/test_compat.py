# SPDX-License-Identifier: Apache-2.0
"""The names of ring-flash-attn and yunchang on real processes, with their cuts, against full attention."""

import inspect

import pytest
import torch
from torch import distributed

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.sequence_parallel.compat import ring_flash_attn, yunchang

LENGTHS = (16, 64, 40)


def cut(x, lengths, rank, size, zigzag):
    """This rank's rows of every sequence, as the two libraries' tests take them."""
    local = []
    for part in x.split(lengths):
        if zigzag:
            chunks = part.chunk(2 * size)
            local += [chunks[rank], chunks[2 * size - 1 - rank]]
        else:
            local.append(part.chunk(size)[rank])
    return torch.cat(local)


def exact(lengths, causal, seed=0):
    draw = torch.Generator().manual_seed(seed)
    q, k, v, dout = (torch.randn(sum(lengths), 4, 16, generator=draw, dtype=torch.float64) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = varlen_attention(q, k, v, cu_seqlens_q=VarlenLayout(lengths), causal=causal, return_lse=True)
    out.backward(dout)
    return (q.detach(), k.detach(), v.detach(), dout), (out.detach(), lse.detach(), q.grad, k.grad, v.grad)


def relative(actual, wanted):
    return ((actual - wanted).norm() / wanted.norm()).item()


def ring_errors(zigzag, varlen, packing, causal):
    rank, size = distributed.get_rank(), distributed.get_world_size()
    lengths = LENGTHS if varlen else (48, 48)
    inputs, wanted = exact(lengths, causal)
    q, k, v, dout = (cut(x, lengths, rank, size, zigzag) for x in inputs)
    fold = (lambda x: x) if varlen else (lambda x: x.unflatten(0, (2, -1)))
    parts = {"": [q, k, v], "kvpacked_": [q, torch.stack((k, v), 1)], "qkvpacked_": [torch.stack((q, k, v), 1)]}[
        packing
    ]
    parts = [fold(x).clone().requires_grad_() for x in parts]
    name = ("zigzag_" if zigzag else "") + "ring_flash_attn_" + ("varlen_" if varlen else "") + packing + "func"
    local = torch.tensor((0, *torch.tensor(lengths).cumsum(0).tolist()), dtype=torch.int32) // size
    where = (local, max(lengths) // size) if varlen else ()
    function = getattr(ring_flash_attn, name)
    out, lse, _ = function(*parts, *where, 0.0, None, causal, return_attn_probs=True)
    out.backward(fold(dout))
    flat = [x.grad if varlen else x.grad.flatten(0, 1) for x in parts]
    grads = [g for x in flat for g in ([x] if x.dim() == 3 else x.unbind(1))]
    out, lse = (out, lse) if varlen else (out.flatten(0, 1), lse.transpose(0, 1).flatten(1))
    out_w, lse_w, *grads_w = (cut(x.T if x.dim() == 2 else x, lengths, rank, size, zigzag) for x in wanted)
    return [relative(a.detach(), b) for a, b in zip((out, lse.T, *grads), (out_w, lse_w, *grads_w), strict=True)]


@pytest.mark.parametrize(
    ("zigzag", "varlen", "packing", "causal"),
    [(False, False, "", True), (True, False, "qkvpacked_", True), (False, True, "kvpacked_", False),
     (True, True, "", True), (True, True, "qkvpacked_", True), (True, False, "kvpacked_", False)],
)  # fmt: skip
def test_ring_flash_attn(rank_pools, zigzag, varlen, packing, causal):
    for errors in rank_pools(4).run(ring_errors, zigzag, varlen, packing, causal):
        assert max(errors) <= 1e-14


def llama3_errors(causal):
    rank, size, lengths = distributed.get_rank(), distributed.get_world_size(), (5, 90, 1, 24)
    inputs, wanted = exact(lengths, causal)
    *local, dout = (x.chunk(size)[rank] for x in inputs)
    local = [x.clone().requires_grad_() for x in local]
    offsets = VarlenLayout(lengths).cu_seqlens
    *where, seen = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(offsets, causal, rank, size)
    out, lse, _ = ring_flash_attn.llama3_flash_attn_varlen_func(*local, *where, 1, seen, causal=causal,
                                                                return_attn_probs=True)  # fmt: skip
    out.backward(dout)
    out_w, lse_w, *grads_w = ((x.T if x.dim() == 2 else x).chunk(size)[rank] for x in wanted)
    pairs = zip((out.detach(), lse.T, *(x.grad for x in local)), (out_w, lse_w, *grads_w), strict=True)
    return [relative(x, y) for x, y in pairs]


@pytest.mark.parametrize("causal", [True, False])
def test_llama3(rank_pools, causal):
    for errors in rank_pools(4).run(llama3_errors, causal):
        assert max(errors) <= 1e-14
    with pytest.raises(ValueError, match=r"cu_seqlens must end at a multiple of world_size \(4\), got 7"):
        ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 7]), causal, 0, 4)


def hybrid_errors(kind, ulysses, causal, use_ulysses_low):
    rank, size, rows, batch = distributed.get_rank(), distributed.get_world_size(), 48, 2
    inputs, (out_w, _, *grads_w) = exact((rows,) * batch, causal)
    yunchang.set_seq_parallel_pg(ulysses, size // ulysses, rank, size, use_ulysses_low)
    at = rank if use_ulysses_low else (rank % (size // ulysses)) * ulysses + rank // (size // ulysses)
    take = lambda x: yunchang.EXTRACT_FUNC_DICT[kind](  # noqa: E731
        x.unflatten(0, (batch, rows)), at, world_size=size, rd=size // ulysses, ud=ulysses
    )
    *local, dout = (take(x) for x in inputs)
    local = [x.requires_grad_() for x in local]
    attention = yunchang.LongContextAttention(ring_impl_type=kind, attn_type=yunchang.AttnType.TORCH_MATH)
    if ulysses == size:
        attention = yunchang.UlyssesAttention(distributed.new_group(range(size)), attn_type=yunchang.AttnType.FA)
    out = attention(*local, dropout_p=0, causal=causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                    deterministic=False, return_attn_probs=True)  # fmt: skip
    out.backward(dout)
    pairs = [(out.detach(), take(out_w)), *((x.grad, take(y)) for x, y in zip(local, grads_w, strict=True))]
    return [relative(a, b) for a, b in pairs]


@pytest.mark.parametrize(
    ("kind", "ulysses", "causal", "low"),
    [("zigzag", 1, True, True), ("zigzag", 2, True, True), ("basic", 2, False, True), ("basic", 4, True, True),
     ("zigzag", 2, True, False)],
)  # fmt: skip
def test_yunchang(rank_pools, kind, ulysses, causal, low):
    for errors in rank_pools(4).run(hybrid_errors, kind, ulysses, causal, low):
        assert max(errors) <= 1e-14


def test_the_order_of_arguments_is_theirs():
    options = ["dropout_p", "softmax_scale", "causal", "window_size", "alibi_slopes", "deterministic",
               "return_attn_probs", "group"]  # fmt: skip
    assert list(inspect.signature(ring_flash_attn.ring_flash_attn_func).parameters) == ["q", "k", "v", *options]
    assert list(inspect.signature(ring_flash_attn.zigzag_ring_flash_attn_varlen_func).parameters) == [
        "q", "k", "v", "cu_seqlens", "max_seqlen", *options]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout_p": 0.1}, "dropout_p must be 0, .* got 0.1"),
        ({"window_size": (128, 0)}, r"window_size must be \(-1, -1\), .* got \(128, 0\)"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes must be None"),
    ],
)
def test_what_would_change_the_result_is_refused(options, message):
    x = torch.zeros(1, 8, 4, 16)
    with pytest.raises(ValueError, match=message):
        ring_flash_attn.zigzag_ring_flash_attn_func(x, x, x, causal=True, **options)
    with pytest.raises(ValueError, match=message):
        yunchang.LongContextAttention(ring_impl_type="zigzag")(x, x, x, causal=True, **options)
    with pytest.raises(ValueError, match="ring_impl_type must be one of basic, zigzag, got 'strip'"):
        yunchang.LongContextAttention(ring_impl_type="strip")
    with pytest.raises(ValueError, match="attn_type must be an exact one"):
        yunchang.UlyssesAttention(attn_type=yunchang.AttnType.from_string("sage_fp8"))
