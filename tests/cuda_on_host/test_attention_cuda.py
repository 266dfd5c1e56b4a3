# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel that merges partial attention, executed on the host: every branch against the fp64 reference."""

import pytest
import torch

from lrc_kernels.attention import reference
from lrc_kernels.testing import assert_close

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
INF, NAN = torch.inf, torch.nan
LSE_PAIRS = [
    *((1.5, -0.5), (200.0, 0.0), (0.0, 200.0), (-INF, 1.0), (1.0, -INF), (-INF, -INF), (INF, 1.0), (1.0, INF)),
    *((INF, -INF), (NAN, 1.0), (1.0, NAN), (NAN, -INF), (INF, NAN), (NAN, NAN)),
]


def merge(host_kernels, out, lse, out_block, lse_block, reverse=False):
    """The kernel, into a buffer with one more row, which must stay as it was."""
    rows, heads, channels = out.shape
    merged, merged_lse = torch.full((rows + 1, heads, channels), 7.0), torch.full((heads * rows + 1,), 7.0)
    layouts = [[CODES[x.dtype], *x.stride()[:2], *y.stride()] for x, y in ((out, lse), (out_block, lse_block))]
    args = (out, lse, layouts[0], out_block, lse_block, layouts[1], rows, heads, channels, merged, merged_lse)
    host_kernels.call("merge_partials", *args, reverse=reverse)
    assert (merged[rows:] == 7).all() and merged_lse[-1] == 7
    return merged[:rows], merged_lse[:-1].view(heads, rows)


def check(host_kernels, *args):
    merged = merge(host_kernels, *args)
    exact, same = reference.merge_partials(*(x.double() for x in args)), reference.merge_partials(*args)
    for name, *three in zip(("out", "lse"), merged, exact, same, strict=True):
        assert_close(*three, name=name)
    again = merge(host_kernels, *args, reverse=True)
    assert all(torch.equal(a.nan_to_num(99.0), b.nan_to_num(99.0)) for a, b in zip(merged, again, strict=True))
    return merged


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 5, 136], ids=["vectors", "odd", "many_vectors"])
def test_merge_partials(host_kernels, dtype, block_dtype, channels):
    rows, heads = 37, 3
    out, out_block = torch.randn(rows, heads, channels).to(dtype), torch.randn(rows, heads, channels).to(block_dtype)
    check(host_kernels, out, torch.randn(heads, rows), out_block, torch.randn(rows, heads).T)


@pytest.mark.parametrize("layout", ["heads_first", "projection", "offset", "lse_slice"])
def test_merge_reads_strided_partials_in_place(host_kernels, layout):
    out, lse = torch.randn(20, 2, 16), torch.randn(2, 20)
    if layout == "heads_first":
        out = torch.randn(2, 20, 16).transpose(0, 1)
    elif layout == "projection":
        out = torch.randn(20, 2, 48)[..., 16:32]
    elif layout == "offset":
        out = torch.randn(20, 2, 19)[..., 3:]
    else:
        lse = torch.randn(4, 41)[::2, 1::2]
    check(host_kernels, out, lse, torch.randn(20, 2, 16).bfloat16(), torch.randn(2, 20))


@pytest.mark.parametrize("channels", [8, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys(host_kernels, dtype, channels):
    """Finite, far apart, empty by either convention and NaN; a row of weight 0 holds NaN, which must not spread."""
    out, out_block = (torch.randn(len(LSE_PAIRS), 2, channels).to(dtype) for _ in range(2))
    lse, lse_block = torch.tensor(LSE_PAIRS).T.unsqueeze(1).expand(2, 2, -1)
    for partial, values in ((out, lse), (out_block, lse_block)):
        partial[~values[0].isfinite()] = torch.nan
    merged, merged_lse = check(host_kernels, out, lse, out_block, lse_block)
    assert merged[5].eq(0).all() and merged_lse[:, 5].eq(-torch.inf).all() and merged[3].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (3, 2, 0), (1, 1, 1)])
def test_smallest_shapes(host_kernels, shape):
    rows, heads, _ = shape
    check(host_kernels, torch.randn(shape), torch.randn(heads, rows), torch.randn(shape), torch.randn(heads, rows))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 1), "num_rows must be >= 0, got -1"),
        ((1, -1, 1), "num_heads must be >= 0, got -1"),
        ((1, 1, -1), "num_channels must be >= 0, got -1"),
        ((1, 1, 2**30), r"num_channels must be < 2\^30, got 1073741824"),
        ((1, 2**30, 1), r"num_heads must be < 2\^30, got 1073741824"),
    ],
)
def test_bad_arguments(host_kernels, sizes, message):
    x = torch.empty(8)
    with pytest.raises(RuntimeError, match=message):
        host_kernels.call("merge_partials", x, x, [0, 1, 1, 1, 1], x, x, [0, 1, 1, 1, 1], *sizes, x, x)
    with pytest.raises(RuntimeError, match="dtype must be 0"):
        host_kernels.call("merge_partials", x, x, [3, 1, 1, 1, 1], x, x, [0, 1, 1, 1, 1], 1, 1, 1, x, x)
