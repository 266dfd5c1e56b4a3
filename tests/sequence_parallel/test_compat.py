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


def cut(x, lengths, rank, size, kind):
    """This rank's rows of every sequence, as the two libraries' tests take them."""
    local = []
    for part in x.split(lengths):
        if kind == "zigzag_ring":
            chunks = part.chunk(2 * size)
            local += [chunks[rank], chunks[2 * size - 1 - rank]]
        else:
            local.append(part[rank::size] if kind == "stripe" else part.chunk(size)[rank])
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


def ring_errors(library, kind, varlen, packing, causal):
    rank, size = distributed.get_rank(), distributed.get_world_size()
    lengths = LENGTHS if varlen else (48, 48)
    inputs, wanted = exact(lengths, causal)
    q, k, v, dout = (cut(x, lengths, rank, size, kind) for x in inputs)
    fold = (lambda x: x) if varlen else (lambda x: x.unflatten(0, (2, -1)))
    parts = {"": [q, k, v], "kvpacked_": [q, torch.stack((k, v), 1)], "qkvpacked_": [torch.stack((q, k, v), 1)]}[
        packing
    ]
    parts = [fold(x).clone().requires_grad_() for x in parts]
    name = f"{kind}_flash_attn_{'varlen_' * varlen}{packing}func"
    local = torch.tensor((0, *torch.tensor(lengths).cumsum(0).tolist()), dtype=torch.int32) // size
    where = (local, max(lengths) // size) if varlen else ()
    function = getattr({"ring_flash_attn": ring_flash_attn, "yunchang": yunchang}[library], name)
    out, lse, _ = function(*parts, *where, 0.0, None, causal, return_attn_probs=True)
    out.backward(fold(dout))
    flat = [x.grad if varlen else x.grad.flatten(0, 1) for x in parts]
    grads = [g for x in flat for g in ([x] if x.dim() == 3 else x.unbind(1))]
    out, lse = (out, lse) if varlen else (out.flatten(0, 1), lse.transpose(0, 1).flatten(1))
    out_w, lse_w, *grads_w = (cut(x.T if x.dim() == 2 else x, lengths, rank, size, kind) for x in wanted)
    return [relative(a.detach(), b) for a, b in zip((out, lse.T, *grads), (out_w, lse_w, *grads_w), strict=True)]


KINDS, PACKINGS = ("ring", "zigzag_ring", "stripe"), ("", "kvpacked_", "qkvpacked_")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("library", "kind", "varlen"),
    [*[("ring_flash_attn", kind, False) for kind in KINDS], *[("ring_flash_attn", kind, True) for kind in KINDS[:2]],
     *[("yunchang", kind, False) for kind in KINDS]],
)  # fmt: skip
def test_every_ring_function(rank_pools, library, kind, varlen, packing, causal):
    for errors in rank_pools(4).run(ring_errors, library, kind, varlen, packing, causal):
        assert max(errors) <= 1e-14


def test_two_ranks(rank_pools):
    for kind in KINDS:
        for errors in rank_pools(2).run(ring_errors, "ring_flash_attn", kind, False, "qkvpacked_", True):
            assert max(errors) <= 1e-14


def llama3_errors(packing, causal):
    rank, size, lengths = distributed.get_rank(), distributed.get_world_size(), (5, 90, 1, 24)
    inputs, wanted = exact(lengths, causal)
    *local, dout = (x.chunk(size)[rank] for x in inputs)
    q, k, v = local
    local = {"": [q, k, v], "kvpacked_": [q, torch.stack((k, v), 1)], "qkvpacked_": [torch.stack((q, k, v), 1)]}[
        packing
    ]
    local = [x.clone().requires_grad_() for x in local]
    offsets = VarlenLayout(lengths).cu_seqlens
    *where, seen = ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(offsets, causal, rank, size)
    function = getattr(ring_flash_attn, f"llama3_flash_attn_varlen_{packing}func")
    out, lse, _ = function(*local, *where, 1, seen, causal=causal, return_attn_probs=True)
    out.backward(dout)
    grads = [g for x in local for g in ([x.grad] if x.dim() == 3 else x.grad.unbind(1))]
    out_w, lse_w, *grads_w = ((x.T if x.dim() == 2 else x).chunk(size)[rank] for x in wanted)
    pairs = zip((out.detach(), lse.T, *grads), (out_w, lse_w, *grads_w), strict=True)
    return [relative(x, y) for x, y in pairs]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_llama3(rank_pools, packing, causal):
    for errors in rank_pools(4).run(llama3_errors, packing, causal):
        assert max(errors) <= 1e-14
    with pytest.raises(ValueError, match=r"cu_seqlens must end at a multiple of world_size \(4\), got 7"):
        ring_flash_attn.llama3_flash_attn_prepare_cu_seqlens(torch.tensor([0, 7]), causal, 0, 4)


ATTENTIONS = {
    "long": lambda kind: yunchang.LongContextAttention(ring_impl_type=kind, attn_type=yunchang.AttnType.TORCH_MATH),
    "async": lambda kind: yunchang.AsyncLongContextAttention(ring_impl_type=kind),
    "qkvpacked": lambda kind: yunchang.LongContextAttentionQKVPacked(ring_impl_type=kind),
    "ulysses": lambda kind: yunchang.UlyssesAttention(attn_type=yunchang.AttnType.FA),
}


def hybrid_errors(name, kind, ulysses, causal, use_ulysses_low):
    rank, size, rows, batch = distributed.get_rank(), distributed.get_world_size(), 48, 2
    inputs, (out_w, _, *grads_w) = exact((rows,) * batch, causal)
    yunchang.set_seq_parallel_pg(ulysses, size // ulysses, rank, size, use_ulysses_low)
    take = lambda x: yunchang.EXTRACT_FUNC_DICT[kind](  # noqa: E731
        x.unflatten(0, (batch, rows)), rank, world_size=size, rd=size // ulysses, ud=ulysses
    )
    *local, dout = (take(x) for x in inputs)
    local = [torch.stack(local, 2)] if name == "qkvpacked" else local
    local = [x.requires_grad_() for x in local]
    out = ATTENTIONS[name](kind)(*local, dropout_p=0, causal=causal, window_size=(-1, -1), softcap=0.0,
                                 alibi_slopes=None, deterministic=False, return_attn_probs=True)  # fmt: skip
    out.backward(dout)
    grads = local[0].grad.unbind(2) if name == "qkvpacked" else [x.grad for x in local]
    pairs = [(out.detach(), take(out_w)), *((x, take(y)) for x, y in zip(grads, grads_w, strict=True))]
    return [relative(a, b) for a, b in pairs]


@pytest.mark.parametrize(
    ("name", "kind", "ulysses", "causal", "low"),
    [("long", "zigzag", 1, True, True), ("long", "zigzag", 2, True, True), ("long", "basic", 2, False, True),
     ("long", "basic_flashinfer", 2, True, True), ("long", "basic", 4, True, True), ("long", "strip", 2, True, True),
     ("long", "zigzag", 2, True, False), ("long", "basic", 2, True, False), ("long", "strip", 2, True, False),
     ("async", "zigzag", 2, True, True), ("qkvpacked", "basic", 2, True, True), ("qkvpacked", "zigzag", 2, True, True),
     ("qkvpacked", "strip", 1, False, True), ("ulysses", "basic", 4, True, True), ("ulysses", "basic", 4, False, True)],
)  # fmt: skip
def test_yunchang(rank_pools, name, kind, ulysses, causal, low):
    for errors in rank_pools(4).run(hybrid_errors, name, kind, ulysses, causal, low):
        assert max(errors) <= 1e-14


def all_to_alls():
    rank, size = distributed.get_rank(), distributed.get_world_size()
    equal = []
    for function, shape, axis in (
        (yunchang.SeqAllToAll4D, (2, 12, 8, 5), 2),
        (yunchang.SeqAllToAll5D, (2, 12, 3, 8, 5), 3),
    ):
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        rows, heads = (whole.chunk(size, dim)[rank].clone().requires_grad_() for dim in (1, axis))
        scattered, gathered = function.apply(None, rows, axis, 1), function.apply(None, heads, 1, axis, True)
        scattered.backward(heads.detach())
        gathered.backward(rows.detach())
        equal += [torch.equal(scattered, heads), torch.equal(gathered, rows), torch.equal(rows.grad, rows),
                  torch.equal(heads.grad, heads)]  # fmt: skip
    with pytest.raises(ValueError, match=r"dimension scatter_idx \(2\) must be divisible by 4 ranks, got shape"):
        yunchang.SeqAllToAll4D.apply(None, torch.zeros(1, 4, 6, 8), 2, 1)
    return all(equal)


def test_all_to_alls_and_their_gradients(rank_pools):
    assert rank_pools(4).run(all_to_alls) == [True] * 4


def test_the_order_of_arguments_is_theirs():
    options = ["dropout_p", "softmax_scale", "causal", "window_size", "alibi_slopes", "deterministic",
               "return_attn_probs", "group"]  # fmt: skip
    assert list(inspect.signature(ring_flash_attn.ring_flash_attn_func).parameters) == ["q", "k", "v", *options]
    assert list(inspect.signature(ring_flash_attn.stripe_flash_attn_func).parameters) == ["q", "k", "v", *options]
    assert list(inspect.signature(ring_flash_attn.zigzag_ring_flash_attn_varlen_func).parameters) == [
        "q", "k", "v", "cu_seqlens", "max_seqlen", *options]  # fmt: skip
    assert list(inspect.signature(yunchang.stripe_flash_attn_func).parameters) == [
        "q", "k", "v", *options[:4], "softcap", *options[4:], "attn_type", "attn_processor"]  # fmt: skip


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
    with pytest.raises(ValueError, match=message):
        yunchang.RING_IMPL_DICT["strip"](x, x, x, causal=True, **options)
    with pytest.raises(ValueError, match="ring_impl_type must be one of basic, zigzag, strip, .*, got 'stripe'"):
        yunchang.LongContextAttention(ring_impl_type="stripe")
    with pytest.raises(ValueError, match="scatter_idx, gather_idx must be 2, 1, got 2, 2"):
        yunchang.LongContextAttentionQKVPacked(3, 2)
    with pytest.raises(ValueError, match="softcap must be 0"):
        yunchang.ring_flash_attn_func(x, x, x, softcap=30.0)
    with pytest.raises(ValueError, match="attn_type must be an exact one"):
        yunchang.RING_IMPL_QKVPACKED_DICT["basic"](torch.stack((x, x, x), 2), attn_type=yunchang.AttnType.SAGE_AUTO)
    with pytest.raises(ValueError, match="attn_type must be an exact one"):
        yunchang.UlyssesAttention(attn_type=yunchang.AttnType.from_string("sage_fp8"))
