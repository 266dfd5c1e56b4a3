# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of ToMe on a GPU, against the fp64 reference; tests/cuda_on_host runs them without one."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.tome import TokenLayout, compress_clips, merge_budget, merge_tokens, native, plan_merge
from lrc_kernels.tome.op import max_backward_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        native.cuda_unavailable() is not None, reason=f"no CUDA kernels to run: {native.cuda_unavailable()}"
    ),
]


def on_cuda(function, *args, **options):
    """Run on the CUDA backend, and see that nothing else ran."""
    with use_backend("cuda"), record() as ran:
        result = function(*args, **options)
    assert ran and {backend for _, backend in ran} == {"cuda"}
    return result


def on_reference(function, *args, **options):
    with use_backend("reference"):
        return function(*args, **options)


def assert_identical(plan, other):
    for name in ("assign", "size", "weight", "anchor"):
        assert torch.equal(getattr(plan, name), getattr(other, name)), name


@pytest.mark.parametrize(("width", "num_tokens"), [(16, 96), (64, 130), (88, 200), (128, 520), (200, 77), (1, 33)])
@pytest.mark.parametrize("num_clips", [1, 3, 200])
def test_one_iteration(device, width, num_tokens, num_clips):
    """Every decision that fp64 finds clear by 1e-5, alone in a cluster and with more clips than multiprocessors."""
    metric = make_input("gaussian", (num_clips, num_tokens, width), device=device, seed=1)
    plan = on_cuda(plan_merge, metric, r=num_tokens // 2)
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    best = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > 1e-5
    kept = num_tokens - num_tokens // 2
    local = plan.assign.view(num_clips, num_tokens).long() - kept * torch.arange(num_clips, device=device)[:, None]
    unmerged = kept - num_tokens // 2
    merged = local[:, 0::2] >= unmerged
    assert torch.equal(merged.sum(1), torch.full((num_clips,), num_tokens // 2, device=device))
    assert torch.equal((local[:, 0::2] - unmerged)[merged & clear], best.indices[..., 0][merged & clear])
    assert_identical(on_cuda(plan_merge, metric, r=num_tokens // 2), plan)


@pytest.mark.parametrize("order", ["reference", "position"])
def test_packed_segments(device, order):
    layout = VarlenLayout([70, 0, 33, 1, 300], device)
    metric = make_input("gaussian", (layout.num_tokens, 20), device=device, seed=1)
    protected = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
    protected[[0, 7, 75]] = True
    metric[11], metric[80] = 0.0, torch.nan
    budget = merge_budget(layout, r=[9, 12], num_protected=2)
    options = {"protected": protected, "order": order}
    plan = on_cuda(plan_merge, metric, budget, **options)
    wanted = on_reference(plan_merge, metric.double(), budget, **options)
    assert_identical(plan, wanted)


def test_threshold_destination_and_bf16(device):
    metric = make_input("gaussian", (80, 24), device=device, seed=9)
    budget = merge_budget(VarlenLayout([60, 0, 20], device), r=[10])
    options = {"destination": torch.arange(80, device=device) % 4 == 2, "threshold": 0.2}
    plan = on_cuda(plan_merge, metric, budget, **options)
    wanted = on_reference(plan_merge, metric.double(), budget, **options)
    assert_identical(plan, wanted)
    assert torch.equal(plan.valid, wanted.valid)
    rounded = on_cuda(plan_merge, metric, budget, precision="bf16")
    same = rounded.assign == on_reference(plan_merge, metric, budget, precision="bf16").assign
    assert float(same.float().mean()) > 0.9


def test_a_clip_of_any_team_equals_itself_in_a_batch(device):
    """8 blocks share a clip that is alone, 1 of a device's multiprocessors has each clip of the whole."""
    metric = make_input("video_like", (140, 2048, 64), device=device, seed=2)
    whole = on_cuda(plan_merge, metric, target=64)
    for clips in (1, 20, 60):
        part = on_cuda(plan_merge, metric[:clips], target=64)
        assert torch.equal(part.assign, whole.assign[: clips * 2048])
        assert torch.equal(part.size, whole.size[: clips * 64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_merge(device, dtype, reduce):
    layout = VarlenLayout([600, 0, 31], device)
    x = make_input("gaussian", (631, 200), dtype=dtype, device=device, seed=3)
    plan = on_reference(plan_merge, x[:, :16].float(), merge_budget(layout, target=[70, 0, 9]))
    y = on_cuda(merge_tokens, x, plan, reduce=reduce)
    exact = on_reference(merge_tokens, x.double(), plan, reduce=reduce)
    assert_close(y, exact, on_reference(merge_tokens, x, plan, reduce=reduce))
    assert torch.equal(on_cuda(merge_tokens, x, plan, reduce=reduce), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_maximum(device, dtype):
    """Values of +-0.5 tie: it goes to the first token that holds one."""
    layout = VarlenLayout([600, 0, 31], device)
    x = make_input("gaussian", (631, 200), dtype=dtype, device=device, seed=3).clamp(-0.5, 0.5)
    plan = on_reference(plan_merge, x[:, :16].float(), merge_budget(layout, target=[70, 0, 9]))
    y = on_cuda(merge_tokens, x, plan, reduce="max")
    grad = make_input("gaussian", y.shape, dtype=dtype, device=device, seed=4)
    args = (grad, x, y, plan.assign, plan.weight, [])
    assert torch.equal(on_cuda(max_backward_op, *args), on_reference(max_backward_op, *args))


def test_one_streaming_clip_in_a_graph(device):
    layout = TokenLayout(clip_frames=4, grid=(32, 32), shuffle=2, prefix=1)
    x = make_input("video_like", (4, 1025, 256), dtype=torch.bfloat16, device=device, seed=4)

    def compress():
        return on_cuda(compress_clips, x, 64, 8, layout=layout)

    compress()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compress()
    x.copy_(make_input("video_like", x.shape, dtype=x.dtype, device=device, seed=5))
    graph.replay()
    assert torch.equal(captured, compress())
