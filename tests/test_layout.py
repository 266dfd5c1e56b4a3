# SPDX-License-Identifier: Apache-2.0
"""VarlenLayout: what it holds, and what it refuses."""

import pytest
import torch
from torch.utils import _pytree as pytree

from lrc_kernels import VarlenLayout
from lrc_kernels.layout import as_layout


def test_fields():
    layout = VarlenLayout([3, 0, 5])
    assert layout.cu_seqlens.tolist() == [0, 3, 3, 8] and layout.cu_seqlens.dtype == torch.int32
    assert (layout.lengths, layout.max_seqlen, layout.num_tokens, layout.num_sequences) == ((3, 0, 5), 5, 8, 3)
    assert not layout.is_uniform and VarlenLayout([4, 4]).is_uniform


def test_empty():
    layout = VarlenLayout([])
    assert (layout.cu_seqlens.tolist(), layout.max_seqlen, layout.num_tokens) == ([0], 0, 0)
    assert VarlenLayout.uniform(0, 7) == layout


def test_uniform_equals_list():
    assert VarlenLayout.uniform(3, 4) == VarlenLayout([4, 4, 4])
    assert VarlenLayout.uniform(3, 4).cu_seqlens.tolist() == [0, 4, 8, 12]


def test_from_cu_seqlens_round_trip():
    layout = VarlenLayout([2, 6])
    assert as_layout(layout) is layout
    assert as_layout(layout.cu_seqlens) == layout and as_layout(layout.cu_seqlens.long()) == layout


def test_pytree_keeps_the_host_side_out_of_the_leaves():
    leaves, spec = pytree.tree_flatten(VarlenLayout([2, 6]))
    assert [leaf.tolist() for leaf in leaves] == [[0, 2, 8]]
    assert pytree.tree_unflatten(leaves, spec) == VarlenLayout([2, 6])


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([3, -1], ValueError, r"lengths\[1\] must be >= 0, got -1"),
        ([3, 1.5], TypeError, r"lengths\[1\] must be an int, got float"),
        ([True], TypeError, "bool"),
        (5, TypeError, "lengths must be a sequence of ints on the host, got int"),
        (torch.tensor([1, 2]), TypeError, "got Tensor"),
        ([2**31], ValueError, "less than 2\\^31 rows, got 2147483648"),
    ],
)
def test_refuses_lengths(lengths, error, message):
    with pytest.raises(error, match=message):
        VarlenLayout(lengths)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([1, 2], dtype=torch.int32), ValueError, "must start at 0, got 1"),
        (torch.tensor([0, 5, 3], dtype=torch.int32), ValueError, "must not decrease, got 5 then 3 at index 2"),
        (torch.tensor([0.0, 1.0]), TypeError, "float32"),
        (torch.zeros(2, 2, dtype=torch.int32), ValueError, r"shape \[S \+ 1\], got \[2, 2\]"),
        ([0, 2], TypeError, "got list"),
    ],
)
def test_refuses_cu_seqlens(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        as_layout(cu_seqlens)


def test_lengths_that_only_the_device_knows():
    layout = VarlenLayout.on_device(torch.tensor([0, 3, 8], dtype=torch.int32), max_seqlen=7, num_tokens=8)
    with pytest.raises(ValueError, match="lengths must be known on the host"):
        _ = layout.lengths
    assert (layout.max_seqlen, layout.num_tokens, layout.num_sequences) == (7, 8, 2)
    assert not layout.is_uniform and "on device" in repr(layout)
    assert layout == layout and layout != VarlenLayout([3, 5]) and VarlenLayout([3, 5]) != layout
    leaves, spec = pytree.tree_flatten(layout)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.max_seqlen == 7 and again.num_tokens == 8 and not again.is_uniform
