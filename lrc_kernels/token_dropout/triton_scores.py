# SPDX-License-Identifier: Apache-2.0
"""The scores of token dropout in Triton: logits and statistics per block of keys, their merge in ascending order, the
reduction over heads and rows; and column sums. Launches as `reference_scores.py` defines the ops.

Scratch is O(Tk * Hq) fp32 where a sequence has one row (K is read once), O(Tk) with an lse or several rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INFINITY = tl.constexpr(float("inf"))


class ScoreBlocks(NamedTuple):
    """Tile sizes. `keys` is part of the contract (statistics are of 128 keys); tests make all of them 16."""

    keys: int = 128
    # The pass with a known lse has no grid over heads: small tiles fill the device.
    apply_keys: int = 32
    merge: int = 128
    heads: int = 32
    column_rows: int = 64
    column_keys: int = 128
    num_warps: int = 4
    column_warps: int = 8
    num_stages: int = 3


def score_blocks(dtype: torch.dtype) -> ScoreBlocks:
    """fp32 keys are multiplied as three bf16 parts, which need registers and smaller tiles."""
    return ScoreBlocks(apply_keys=16, column_rows=32, column_keys=64) if dtype == torch.float32 else ScoreBlocks()


@triton.jit
def _key_offset(table_ptr, i_s, start, o_n, m_n, block_size, max_blocks, stride_k_block, stride_k_token):
    """Element offset of keys o_n of sequence i_s, packed or through the block table."""
    if table_ptr is not None:
        row = table_ptr + i_s.to(tl.int64) * max_blocks
        block = tl.load(row + o_n // block_size, mask=m_n, other=0)
        return block.to(tl.int64) * stride_k_block + (o_n % block_size).to(tl.int64) * stride_k_token
    return (start + o_n).to(tl.int64) * stride_k_token


@triton.jit
def _load_rows(order_ptr, position_ptr, first, end, G: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows of q, the head within the group, the position and the mask of an M tile: rows x padded heads of a group."""
    o_m = tl.arange(0, BLOCK_M)
    slot, group = first + o_m // BLOCK_G, o_m % BLOCK_G
    m_m = (slot < end) & (group < G)
    row = tl.load(order_ptr + slot, mask=m_m, other=0)
    position = tl.load(position_ptr + row, mask=m_m, other=-1)
    return row, group, position, m_m


@triton.jit
def _last_position(order_ptr, position_ptr, row_start, row_end):
    last = tl.full([], -1, tl.int32)
    for r in range(row_start, row_end):
        last = tl.maximum(last, tl.load(position_ptr + tl.load(order_ptr + r)))
    return last


@triton.jit
def _split(x):
    """Three bf16 parts whose sum is x to fp32's precision (an infinity becomes NaN)."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _load_keys(k_ptr, k_offset, m_n, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The 16-bit tile of keys; fp32 keys are loaded in pieces by `_dot`, for their parts to fit into registers."""
    if k_ptr.dtype.element_ty == tl.float32:
        return m_n
    else:  # noqa: RET505 - Triton compiles both returns unless they stand in both branches
        o_k = tl.arange(0, BLOCK_K)
        return tl.load(k_ptr + k_offset[:, None] + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=0.0)


@triton.jit
def _dot(
    q_ptr, q_offset, m_m, k_ptr, k_offset, m_n, b_k,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """<q_m, k_n> in fp32. fp32 operands as six products of bf16 parts, the smallest first: what is left out lies below
    fp32's rounding, and the multiply runs on tensor cores."""
    if k_ptr.dtype.element_ty == tl.float32:
        PIECE: tl.constexpr = BLOCK_K if BLOCK_K < 32 else 32
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, BLOCK_K, PIECE):
            o_k = first + tl.arange(0, PIECE)
            m_k = (o_k < K)[None, :]
            b_q = tl.load(q_ptr + q_offset[:, None] + o_k[None, :], mask=m_m[:, None] & m_k, other=0.0)
            b_piece = tl.load(k_ptr + k_offset[:, None] + o_k[None, :], mask=m_n[:, None] & m_k, other=0.0)
            q_high, q_middle, q_low = _split(b_q)
            k_high, k_middle, k_low = _split(tl.trans(b_piece))
            acc = tl.dot(q_low, k_high, acc)
            acc = tl.dot(q_middle, k_middle, acc)
            acc = tl.dot(q_high, k_low, acc)
            acc = tl.dot(q_middle, k_high, acc)
            acc = tl.dot(q_high, k_middle, acc)
            acc = tl.dot(q_high, k_high, acc)
        return acc
    else:  # noqa: RET505
        o_k = tl.arange(0, BLOCK_K)
        b_q = tl.load(q_ptr + q_offset[:, None] + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0)
        return tl.dot(b_q, tl.trans(b_k))


@triton.jit
def _larger(a, b):
    """The larger of both; NaN wins."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _max_of(x, axis: tl.constexpr):
    """The maximum of numbers >= 0; NaN wins (tl.max skips it)."""
    is_nan = tl.max((x != x).to(tl.int32), axis)
    return tl.where(is_nan > 0, float("nan"), tl.max(tl.where(x != x, 0.0, x), axis))


@triton.jit(do_not_specialize=["num_blocks", "num_tokens", "max_blocks", "block_size"])
def attention_scores_fwd_partial_kernel(
    q_ptr, k_ptr, table_ptr, cu_ptr, order_ptr, cu_rows_ptr, position_ptr, p_ptr, maximum_ptr, sum_ptr,
    num_blocks, num_tokens, block_size, max_blocks, stride_k_block, stride_k_token, stride_k_head, softmax_scale,
    HQ: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks of keys, kv heads). Maximum and sum of exp(logit - maximum) of each (row, head) of the
    sequence over one block of keys [R, HQ, num_blocks]; with p_ptr also the exponentials themselves [HQ, Tk].
    """
    i_block, i_s = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_h = tl.program_id(1)
    row_start, row_end = tl.load(cu_rows_ptr + i_s), tl.load(cu_rows_ptr + i_s + 1)
    start = tl.load(cu_ptr + i_s)
    length = tl.load(cu_ptr + i_s + 1) - start
    end = tl.minimum(length - 1, _last_position(order_ptr, position_ptr, row_start, row_end)) + 1
    if i_block * BLOCK_N < end:
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        offset = _key_offset(table_ptr, i_s, start, o_n, m_n, block_size, max_blocks, stride_k_block, stride_k_token)
        offset += i_h.to(tl.int64) * stride_k_head
        b_k = _load_keys(k_ptr, offset, m_n, K, BLOCK_K)
        for r in range(row_start, row_end, BLOCK_M // BLOCK_G):
            row, group, position, m_m = _load_rows(order_ptr, position_ptr, r, row_end, G, BLOCK_G, BLOCK_M)
            vector = row.to(tl.int64) * HQ + i_h * G + group
            b_s = _dot(q_ptr, vector * K, m_m, k_ptr, offset, m_n, b_k, K, BLOCK_K, BLOCK_M, BLOCK_N) * softmax_scale
            visible = m_n[None, :] & (o_n[None, :] <= position[:, None])
            b_s = tl.where(visible, b_s, -INFINITY)
            b_max = tl.max(b_s, 1)
            b_p = tl.exp(b_s - tl.where(b_max == -INFINITY, 0.0, b_max)[:, None])
            b_p = tl.where(visible, b_p, 0.0)
            tl.store(maximum_ptr + vector * num_blocks + i_block, b_max, mask=m_m)
            tl.store(sum_ptr + vector * num_blocks + i_block, tl.sum(b_p, 1), mask=m_m)
            if p_ptr is not None:
                at = (i_h * G + group).to(tl.int64)[:, None] * num_tokens + (start + o_n)[None, :]
                tl.store(p_ptr + at, b_p, mask=m_m[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["num_blocks"])
def attention_scores_fwd_merge_kernel(
    cu_ptr, row_sequence_ptr, position_ptr, maximum_ptr, sum_ptr, offset_ptr, inverse_ptr, factor_ptr, num_blocks,
    HQ: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Grid (rows, heads). The maximum over all blocks and 1 / sum relative to it [R, HQ], blocks in ascending order;
    with factor_ptr instead what the exponentials of each block are multiplied by [R, HQ, num_blocks].
    """
    i_r, i_h = tl.program_id(0), tl.program_id(1)
    i_s = tl.load(row_sequence_ptr + i_r)
    if i_s >= 0:
        length = tl.load(cu_ptr + i_s + 1) - tl.load(cu_ptr + i_s)
        end = tl.minimum(length - 1, tl.load(position_ptr + i_r)) + 1
        blocks = tl.cdiv(end, BLOCK_N)
        vector = i_r.to(tl.int64) * HQ + i_h
        largest = tl.full([], -INFINITY, tl.float32)
        for b in range(0, blocks, BLOCK_B):
            o_b = b + tl.arange(0, BLOCK_B)
            b_max = tl.load(maximum_ptr + vector * num_blocks + o_b, mask=o_b < blocks, other=-INFINITY)
            largest = tl.maximum(largest, tl.max(b_max, 0))
        base = tl.where(largest == -INFINITY, 0.0, largest)
        total = tl.zeros([], tl.float32)
        for b in range(0, blocks, BLOCK_B):
            o_b = b + tl.arange(0, BLOCK_B)
            b_max = tl.load(maximum_ptr + vector * num_blocks + o_b, mask=o_b < blocks, other=-INFINITY)
            b_sum = tl.load(sum_ptr + vector * num_blocks + o_b, mask=o_b < blocks, other=0.0)
            total += tl.sum(b_sum * tl.exp(b_max - base), 0)
        if factor_ptr is None:
            tl.store(offset_ptr + vector, base)
            tl.store(inverse_ptr + vector, 1.0 / total)
        else:
            for b in range(0, blocks, BLOCK_B):
                o_b = b + tl.arange(0, BLOCK_B)
                b_max = tl.load(maximum_ptr + vector * num_blocks + o_b, mask=o_b < blocks, other=0.0)
                b_factor = tl.exp(b_max - base) * (1.0 / total)
                tl.store(factor_ptr + vector * num_blocks + o_b, b_factor, mask=o_b < blocks)


@triton.jit(do_not_specialize=["num_blocks", "num_tokens"])
def attention_scores_fwd_reduce_kernel(
    p_ptr, cu_ptr, order_ptr, cu_rows_ptr, position_ptr, maximum_ptr, offset_ptr, inverse_ptr, scores_ptr,
    num_blocks, num_tokens, head_scale,
    HQ: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks of keys). scores of one block from the exponentials of the sequence's one row."""
    i_block, i_s = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    row_start, row_end = tl.load(cu_rows_ptr + i_s), tl.load(cu_rows_ptr + i_s + 1)
    if row_start < row_end:
        start = tl.load(cu_ptr + i_s)
        row = tl.load(order_ptr + row_start)
        end = tl.minimum(tl.load(cu_ptr + i_s + 1) - start - 1, tl.load(position_ptr + row)) + 1
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        acc = tl.zeros([BLOCK_N], tl.float32)
        if i_block * BLOCK_N < end:
            for first in range(0, HQ, BLOCK_H):
                o_h = first + tl.arange(0, BLOCK_H)
                m_h = o_h < HQ
                vector = row.to(tl.int64) * HQ + o_h
                b_max = tl.load(maximum_ptr + vector * num_blocks + i_block, mask=m_h, other=0.0)
                base = tl.load(offset_ptr + vector, mask=m_h, other=0.0)
                factor = tl.exp(b_max - base) * tl.load(inverse_ptr + vector, mask=m_h, other=0.0)
                at = o_h.to(tl.int64)[:, None] * num_tokens + (start + o_n)[None, :]
                b_p = tl.load(p_ptr + at, mask=m_h[:, None] & m_n[None, :], other=0.0) * factor[:, None]
                b_p = tl.where(m_h[:, None] & m_n[None, :], b_p, 0.0)
                acc = _larger(acc, _max_of(b_p, 0)) if MAX else acc + tl.sum(b_p, 0)
        tl.store(scores_ptr + start + o_n, acc * head_scale, mask=m_n)


@triton.jit(do_not_specialize=["num_blocks", "max_blocks", "block_size"])
def attention_scores_fwd_apply_kernel(
    q_ptr, k_ptr, table_ptr, cu_ptr, order_ptr, cu_rows_ptr, position_ptr, offset_ptr, inverse_ptr, scores_ptr,
    num_blocks, block_size, max_blocks, stride_k_block, stride_k_token, stride_k_head, stride_offset_row,
    stride_offset_head, softmax_scale, head_scale,
    HQ: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks of keys). scores from known statistics: p = exp(logit - offset) [* inverse]. Heads, then
    rows, are added in ascending order; an offset (lse) of -inf contributes 0.
    """
    ROWS: tl.constexpr = BLOCK_M // BLOCK_G
    i_block, i_s = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    row_start, row_end = tl.load(cu_rows_ptr + i_s), tl.load(cu_rows_ptr + i_s + 1)
    start = tl.load(cu_ptr + i_s)
    length = tl.load(cu_ptr + i_s + 1) - start
    end = tl.minimum(length - 1, _last_position(order_ptr, position_ptr, row_start, row_end)) + 1
    if i_block * BLOCK_N < end:
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        offset = _key_offset(table_ptr, i_s, start, o_n, m_n, block_size, max_blocks, stride_k_block, stride_k_token)
        total = tl.zeros([BLOCK_N], tl.float32)
        for r in range(row_start, row_end, ROWS):
            row, group, position, m_m = _load_rows(order_ptr, position_ptr, r, row_end, G, BLOCK_G, BLOCK_M)
            acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
            for i_h in range(HKV):
                k_offset = offset + tl.cast(i_h, tl.int64) * stride_k_head
                b_k = _load_keys(k_ptr, k_offset, m_n, K, BLOCK_K)
                head = i_h * G + group
                q_offset = (row.to(tl.int64) * HQ + head) * K
                b_s = _dot(q_ptr, q_offset, m_m, k_ptr, k_offset, m_n, b_k, K, BLOCK_K, BLOCK_M, BLOCK_N)
                b_s = b_s * softmax_scale
                at = row.to(tl.int64) * stride_offset_row + head.to(tl.int64) * stride_offset_head
                base = tl.load(offset_ptr + at, mask=m_m, other=0.0)
                b_p = tl.exp(b_s - base[:, None])
                if inverse_ptr is not None:
                    b_p = b_p * tl.load(inverse_ptr + at, mask=m_m, other=0.0)[:, None]
                visible = (m_m & (base != -INFINITY))[:, None] & (o_n[None, :] <= position[:, None])
                b_p = tl.reshape(tl.where(visible, b_p, 0.0), [ROWS, BLOCK_G, BLOCK_N])
                acc = _larger(acc, _max_of(b_p, 1)) if MAX else acc + tl.sum(b_p, 1)
            total += tl.sum(acc, 0)
        scale = head_scale / (row_end - row_start).to(tl.float32)
        tl.store(scores_ptr + start + o_n, total * scale, mask=m_n)


@triton.jit
def _visible(mask_ptr, start_q, o_m, o_n, rows, keys, CAUSAL: tl.constexpr):
    """Which rows o_m of a sequence see which keys o_n."""
    m_m = o_m < rows
    if mask_ptr is not None:
        m_m = m_m & (tl.load(mask_ptr + start_q + o_m, mask=m_m, other=0) != 0)
    visible = m_m[:, None] & (o_n < keys)[None, :]
    if CAUSAL:
        visible = visible & (o_n[None, :] <= o_m[:, None] + (keys - rows))
    return visible


@triton.jit(do_not_specialize=["num_blocks"])
def attention_column_sums_fwd_kernel(
    q_ptr, k_ptr, lse_ptr, mask_ptr, cu_q_ptr, cu_k_ptr, out_ptr, num_blocks, stride_q_row, stride_q_head,
    stride_k_token, stride_k_head, stride_lse_head, softmax_scale, head_scale,
    HKV: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, CAUSAL: tl.constexpr, REDUCE: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks of keys). A program owns its keys: over the heads, over tiles of rows, ascending."""
    i_block, i_s = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    start_q, start_k = tl.load(cu_q_ptr + i_s), tl.load(cu_k_ptr + i_s)
    rows, keys = tl.load(cu_q_ptr + i_s + 1) - start_q, tl.load(cu_k_ptr + i_s + 1) - start_k
    if i_block * BLOCK_N < keys:
        o_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < keys
        first = 0
        if CAUSAL:
            first = tl.maximum(0, i_block * BLOCK_N - (keys - rows)) // BLOCK_M * BLOCK_M
        count = tl.zeros([BLOCK_N], tl.float32)
        if REDUCE == "mean":
            for i in range(first, rows, BLOCK_M):
                o_m = i + tl.arange(0, BLOCK_M)
                visible = _visible(mask_ptr, start_q, o_m, o_n, rows, keys, CAUSAL)
                count += tl.sum(visible.to(tl.float32), 0)
        total = tl.zeros([BLOCK_N], tl.float32)
        for head in range(HKV * G):
            k_offset = (start_k + o_n).to(tl.int64) * stride_k_token + tl.cast(head // G, tl.int64) * stride_k_head
            b_k = _load_keys(k_ptr, k_offset, m_n, K, BLOCK_K)
            acc = tl.zeros([BLOCK_N], tl.float32)
            for i in range(first, rows, BLOCK_M):
                o_m = i + tl.arange(0, BLOCK_M)
                m_m = o_m < rows
                at = (start_q + o_m).to(tl.int64)
                q_offset = at * stride_q_row + tl.cast(head, tl.int64) * stride_q_head
                b_lse = tl.load(lse_ptr + tl.cast(head, tl.int64) * stride_lse_head + at, mask=m_m, other=0.0)
                visible = _visible(mask_ptr, start_q, o_m, o_n, rows, keys, CAUSAL)
                b_s = _dot(q_ptr, q_offset, m_m, k_ptr, k_offset, m_n, b_k, K, BLOCK_K, BLOCK_M, BLOCK_N)
                b_s = b_s * softmax_scale
                b_p = tl.where(visible & (b_lse != -INFINITY)[:, None], tl.exp(b_s - b_lse[:, None]), 0.0)
                acc = _larger(acc, _max_of(b_p, 0)) if REDUCE == "max" else acc + tl.sum(b_p, 0)
            if REDUCE == "mean":
                acc = acc / tl.maximum(count, 1.0)
            total = _larger(total, acc) if MAX else total + acc
        tl.store(out_ptr + start_k + o_n, total * head_scale, mask=m_n)


def declines(name: str, value: Tensor) -> str | None:
    if value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return f"{name} must be fp32, bf16 or fp16, got {str(value.dtype).removeprefix('torch.')}"


def supports_scores(q: Tensor, k: Tensor, *rest: object) -> str | None:
    return declines("k", k)


def supports_column_sums(q: Tensor, k: Tensor, *rest: object) -> str | None:
    return declines("k", k)


def unit_channel_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def head_tiles(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """constexprs of the tiles that hold a group of heads: an M tile is 16 vectors, or one padded group."""
    group = num_heads // num_kv_heads
    padded = triton.next_power_of_2(group)
    return {
        "HQ": num_heads,
        "G": group,
        "K": head_dim,
        "BLOCK_G": padded,
        "BLOCK_M": max(16, padded),
        "BLOCK_K": max(16, triton.next_power_of_2(head_dim)),
    }


def launch_scores(
    q: Tensor, k: Tensor, cu_seqlens_k: Tensor, row_sequence: Tensor, row_position: Tensor, block_table: Tensor | None,
    lse: Tensor | None, num_tokens: int, max_seqlen: int, head_reduce: str, one_row: bool, softmax_scale: float,
) -> Tensor:  # fmt: skip
    q, k, blocks = q.contiguous(), unit_channel_stride(k), score_blocks(k.dtype)
    scores = torch.zeros(num_tokens, dtype=torch.float32, device=k.device)
    (rows, heads, head_dim), num_sequences = q.shape, cu_seqlens_k.shape[0] - 1
    if 0 in (rows, num_sequences, max_seqlen):
        return scores
    cu, position = cu_seqlens_k.contiguous(), row_position.contiguous()
    # Rows by sequence, ascending within it; rows that do not count stand at the end.
    slot = torch.where(row_sequence < 0, num_sequences, row_sequence)
    slot, order = torch.sort(slot, stable=True)
    cu_rows = torch.searchsorted(slot, torch.arange(num_sequences + 1, dtype=slot.dtype, device=k.device))
    shared = (cu, order, cu_rows, position)
    table = None if block_table is None else block_table.contiguous()
    paged = (0, 0) if table is None else (k.shape[1], table.shape[1])
    strides = (0 if table is None else k.stride(0), k.stride(-3), k.stride(-2))
    tiles = head_tiles(heads, k.shape[-2], head_dim)
    head_scale = 1.0 / heads if head_reduce == "mean" else 1.0
    offset, inverse, offset_strides = lse, None, (1, 0)
    if lse is not None:
        offset_strides = (lse.stride(1), lse.stride(0))
    else:
        num_blocks = triton.cdiv(max_seqlen, blocks.keys)
        p = torch.empty(heads, num_tokens, dtype=torch.float32, device=k.device) if one_row else None
        maximum, total = torch.empty(2, rows, heads, num_blocks, dtype=torch.float32, device=k.device)
        offset, inverse = torch.empty(2, rows, heads, dtype=torch.float32, device=k.device)
        offset_strides = (heads, 1)
        with torch.cuda.device_of(k):
            attention_scores_fwd_partial_kernel[(num_sequences * num_blocks, k.shape[-2])](
                q, k, table, *shared, p, maximum, total, num_blocks, num_tokens, *paged, *strides, softmax_scale,
                **tiles, BLOCK_N=blocks.keys, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
            )  # fmt: skip
            attention_scores_fwd_merge_kernel[(rows, heads)](
                cu, row_sequence.contiguous(), position, maximum, total, offset, inverse, None, num_blocks, HQ=heads,
                BLOCK_N=blocks.keys, BLOCK_B=blocks.merge,
            )  # fmt: skip
            if p is not None:
                attention_scores_fwd_reduce_kernel[(num_sequences * num_blocks,)](
                    p, *shared, maximum, offset, inverse, scores, num_blocks, num_tokens, head_scale, HQ=heads,
                    BLOCK_H=min(blocks.heads, triton.next_power_of_2(heads)), BLOCK_N=blocks.keys,
                    MAX=head_reduce == "max",
                )  # fmt: skip
                return scores
    num_blocks = triton.cdiv(max_seqlen, blocks.apply_keys)
    with torch.cuda.device_of(k):
        attention_scores_fwd_apply_kernel[(num_sequences * num_blocks,)](
            q, k, table, *shared, offset, inverse, scores, num_blocks, *paged, *strides, *offset_strides, softmax_scale,
            head_scale, HKV=k.shape[-2], **tiles, BLOCK_N=blocks.apply_keys, MAX=head_reduce == "max",
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    return scores


def launch_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_mask: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    reduce: str,
    head_reduce: str,
    softmax_scale: float,
) -> Tensor:
    q, k, blocks = unit_channel_stride(q), unit_channel_stride(k), score_blocks(k.dtype)
    lse = lse if lse.stride(1) == 1 else lse.contiguous()
    out = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
    num_sequences, heads = cu_seqlens_k.shape[0] - 1, q.shape[1]
    if 0 in (num_sequences, max_seqlen_k, max_seqlen_q):
        return out
    tiles = head_tiles(heads, k.shape[1], k.shape[2])
    num_blocks = triton.cdiv(max_seqlen_k, blocks.column_keys)
    mask = None if query_mask is None else query_mask.contiguous().view(torch.int8)
    with torch.cuda.device_of(k):
        attention_column_sums_fwd_kernel[(num_sequences * num_blocks,)](
            q, k, lse, mask, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), out, num_blocks, q.stride(0),
            q.stride(1), k.stride(0), k.stride(1), lse.stride(0), softmax_scale,
            1.0 / heads if head_reduce == "mean" else 1.0, HKV=k.shape[1], G=tiles["G"], K=tiles["K"],
            BLOCK_M=blocks.column_rows, BLOCK_N=blocks.column_keys, BLOCK_K=tiles["BLOCK_K"], CAUSAL=causal,
            REDUCE=reduce, MAX=head_reduce == "max", num_warps=blocks.column_warps, num_stages=blocks.num_stages,
        )  # fmt: skip
    return out
