# SPDX-License-Identifier: Apache-2.0
"""The emulation itself: what CUDA defines comes out right, and what is wrong in CUDA is found."""

import pytest
import torch


@pytest.mark.parametrize("reverse", [False, True])
def test_shuffles_shared_memory_and_barriers(host_kernels, reverse):
    x = torch.arange(1000.0)
    out = torch.empty(4)
    host_kernels.call("block_sum", x, out, 4, 256, 1000, reverse=reverse)
    assert torch.equal(out, torch.nn.functional.pad(x, (0, 24)).view(4, 256).sum(1))


def test_a_missing_barrier_shows_in_one_of_the_orders(host_kernels):
    x = torch.arange(128.0)
    wanted = x.view(2, 64).flip(1).flatten()
    results = {}
    for synchronise in (0, 1):
        for reverse in (False, True):
            out = torch.empty(128)
            host_kernels.call("reverse", x, out, 2, 64, synchronise, reverse=reverse)
            results[synchronise, reverse] = torch.equal(out, wanted)
    assert results[1, False] and results[1, True]
    assert not results[0, False] and not results[0, True]


@pytest.mark.parametrize("reverse", [False, True])
def test_votes_scans_atomics_and_early_returns(host_kernels, reverse):
    x = torch.randint(0, 50, (128,), dtype=torch.int32)
    scan, ballot = torch.empty(128, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    count, histogram = torch.empty(1, dtype=torch.int32), torch.zeros(7, dtype=torch.int32)
    host_kernels.call("warp_features", x, scan, ballot, count, histogram, 128, 7, reverse=reverse)
    assert torch.equal(scan, x.view(4, 32).cumsum(1).flatten().int())
    bits = (x.view(4, 32).long() % 2) << torch.arange(32)
    assert torch.equal(ballot.long() & 0xFFFFFFFF, bits.sum(1))
    assert count.item() == (x[:64] % 2).sum() and torch.equal(histogram, torch.bincount(x % 7, minlength=7).int())


def test_deadlock_is_reported_not_waited_for(host_kernels):
    message = r"deadlock: block \(0, 0, 0\): deadlock: 31 threads wait at __shfl_sync, 1 threads wait at __syncthreads"
    with pytest.raises(RuntimeError, match=message):
        host_kernels.call("deadlock", torch.empty(64))
    test_shuffles_shared_memory_and_barriers(host_kernels, False)


def test_indices_of_three_dimensions(host_kernels):
    sizes = [3, 2, 2, 4, 3, 2]
    out = torch.empty(3 * 2 * 2 * 4 * 3 * 2, 2, dtype=torch.int32)
    host_kernels.call("positions", out, sizes)
    block, thread = (torch.cartesian_prod(*(torch.arange(n) for n in reversed(s))) for s in (sizes[:3], sizes[3:]))
    code = [b[:, 2] | b[:, 1] << 8 | b[:, 0] << 16 for b in (block, thread)]
    wanted = torch.stack([code[0].repeat_interleave(24), code[1].repeat(12)], 1).int()
    assert torch.equal(out, wanted)


def test_launch_limits(host_kernels):
    with pytest.raises(RuntimeError, match="block_sum: invalid configuration argument"):
        host_kernels.call("block_sum", torch.empty(1), torch.empty(1), 1, 2048, 1)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)])
def test_conversions_round_as_torch_does(host_kernels, dtype, code):
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        6e-8,
        2.0**-25,
        3e38,
        1e-40,
    ]
    random = torch.randint(-(2**31), 2**31 - 1, (4000,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(special), random, torch.randn(2000), torch.randn(2000) * 1e-5, torch.randn(500) * 3e4])
    out = torch.empty_like(x)
    host_kernels.call("round_trip", x, out, x.numel(), code)
    wanted = x.to(dtype).float()
    assert torch.equal(out.isnan(), wanted.isnan())
    kept = ~wanted.isnan()
    assert torch.equal(out[kept].view(torch.int32), wanted[kept].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrix_product(host_kernels, dtype):
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    wanted = d.double() + a.double() @ b.double().T
    host_kernels.call("matrix_product", a, b, d, dtype == torch.bfloat16, 1)
    torch.testing.assert_close(d.double(), wanted, rtol=1e-6, atol=1e-5)


def test_copies_arrive_only_when_they_are_waited_for(host_kernels):
    a, b, d = torch.ones(16, 16, dtype=torch.float16), torch.ones(8, 16, dtype=torch.float16), torch.zeros(16, 8)
    host_kernels.call("matrix_product", a, b, d, 0, 0)
    assert bool(d.isnan().all())


@pytest.mark.parametrize("reverse", [False, True])
def test_the_blocks_of_a_cluster_run_together(host_kernels, reverse):
    x, scratch = torch.arange(12, dtype=torch.int32), torch.full((12,), -1000, dtype=torch.int32)
    out = torch.empty(12, dtype=torch.int32)
    host_kernels.call("cluster_sum", x, scratch, out, 12, 4, 1, reverse=reverse)
    wanted = x.view(3, 4).sum(1).repeat_interleave(4).int()
    assert torch.equal(out, wanted)
    scratch.fill_(-1000)
    host_kernels.call("cluster_sum", x, scratch, out, 12, 4, 0, reverse=reverse)
    assert not torch.equal(out, wanted)
    with pytest.raises(RuntimeError, match="cluster_sum: invalid configuration argument"):
        host_kernels.call("cluster_sum", x, scratch, out, 12, 5, 1)


def test_unknown_dtype(host_kernels):
    with pytest.raises(RuntimeError, match=r"dtype must be 0 \(float32\), 1 \(bfloat16\) or 2 \(float16\), got 7"):
        host_kernels.call("round_trip", torch.empty(1), torch.empty(1), 1, 7)
