# SPDX-License-Identifier: Apache-2.0
"""ToMe's head mean, merge and gather in Triton against the reference, and the connector's one call."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.tome import (
    TokenLayout,
    compress_clips,
    merge_budget,
    merge_tokens,
    plan_merge,
    reference,
    unmerge_tokens,
)
from lrc_kernels.tome.op import gather_op, head_mean_op, max_backward_op, merge_op
from tests.tome.triton_checks import assert_same_plan, on_reference, on_triton

# numpy warns in the interpreter where 0/0 is computed and then masked.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VIT = [2, 4, 6, 2, 1]


def feature_cases(dtype, device):
    """(x, num_heads, layout): dense, strided, packed, one head per channel, and the ViT layout in two memory orders."""

    def make(*shape):
        return make_input("gaussian", shape, dtype=dtype, device=device, seed=len(shape))

    yield "dense", make(2, 47, 50), 2, []
    yield "strided", make(2, 60, 37)[:, ::2, 3:], 1, []
    yield "packed", make(75, 36), 36, []
    yield "vit", make(4, 25, 12), 6, VIT
    yield "vit transposed", make(4, 24, 25).transpose(1, 2), 24, VIT


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_mean(device, dtype):
    for name, x, num_heads, layout in feature_cases(dtype, device):
        metric = on_triton(head_mean_op, x, num_heads, layout)
        wanted = reference.head_mean(x.double(), num_heads, layout)
        assert_close(metric, wanted, reference.head_mean(x, num_heads, layout), name=name)


def random_assignment(num_tokens, device):
    """Three segments, the second empty; some rows without tokens, many tokens with weight 0."""
    random = torch.Generator().manual_seed(num_tokens)
    half = num_tokens // 2 + 1
    layout_in, layout_out = VarlenLayout([half, 0, num_tokens - half], device), VarlenLayout([37, 0, 5], device)
    assign = torch.cat(
        [torch.randint(0, 37, (half,), generator=random), torch.randint(37, 42, (num_tokens - half,), generator=random)]
    )
    alive = (torch.rand(num_tokens, generator=random) > 0.3).float()
    weight = alive * (torch.rand(num_tokens, generator=random) + 0.5)
    return layout_in, layout_out, assign.int().to(device), alive.to(device), weight.to(device)


@pytest.mark.parametrize(
    ("dtype", "kind", "reduce"),
    [
        (torch.float32, "ones", "sum"),
        (torch.float32, "weighted", "mean"),
        (torch.bfloat16, "binary", "mean"),
        (torch.bfloat16, "weighted", "sum"),
        (torch.float16, "ones", "mean"),
        (torch.float16, "weighted", "mean"),
    ],
)
def test_merge_and_gather(device, dtype, kind, reduce):
    for name, x, _, layout in feature_cases(dtype, device):
        num_tokens = reference.tokens_of(x, layout).flatten(0, -2).shape[0]
        layout_in, layout_out, assign, alive, weight = random_assignment(num_tokens, device)
        weight = {"ones": None, "binary": alive, "weighted": weight}[kind]
        ones = torch.ones(num_tokens, device=device)
        size = torch.zeros(42, device=device).index_add(0, assign.long(), ones if weight is None else weight)
        cu = (layout_in.cu_seqlens, layout_out.cu_seqlens, 42, layout_in.max_seqlen)
        args = (assign, size, weight, *cu, reduce, kind != "weighted", layout)
        y = on_triton(merge_op, x, *args)
        assert_close(y, reference.merge(x.double(), *args), reference.merge(x, *args), name=f"merge {name}")
        assert bool((y[size == 0] == 0).all())
        args = (assign, size if reduce == "mean" else None, weight, layout)
        rows = on_triton(gather_op, y, *args)
        assert_close(rows, reference.gather(y.double(), *args), reference.gather(y, *args), name=f"gather {name}")


def merge_arguments(assign, weight, layout_in, layout_out, reduce, binary, layout, hub):
    """Arguments of merge_op for a random assignment, of which a hub takes every token of the first segment."""
    if hub:
        assign = torch.where(torch.arange(assign.shape[0], device=assign.device) < layout_in.lengths[0], 3, assign)
    total = torch.ones(assign.shape[0], device=assign.device) if weight is None else weight
    size = torch.zeros(42, device=assign.device).index_add(0, assign.long(), total)
    cu = (layout_in.cu_seqlens, layout_out.cu_seqlens, 42, layout_out.max_seqlen)
    return assign, size, weight, *cu, reduce, binary, layout


@pytest.mark.parametrize(
    ("name", "dtype", "kind", "reduce", "hub"),
    [
        ("strided", torch.float32, "weighted", "mean", True),
        ("vit", torch.bfloat16, "binary", "mean", True),
        ("packed", torch.float16, "ones", "sum", False),
    ],
)
def test_merge_group_by_group(device, monkeypatch, name, dtype, kind, reduce, hub):
    """Past ONE_HOT_ROWS rows; the hub's group is cut into pieces, the segment with few rows stays a product."""
    monkeypatch.setattr("lrc_kernels.tome.triton_kernels.ONE_HOT_ROWS", 16)
    ((x, layout),) = [(case[1], case[3]) for case in feature_cases(dtype, device) if case[0] == name]
    num_tokens = reference.tokens_of(x, layout).flatten(0, -2).shape[0]
    layout_in, layout_out, assign, alive, weight = random_assignment(num_tokens, device)
    weight = {"ones": None, "binary": alive, "weighted": weight}[kind]
    args = merge_arguments(assign, weight, layout_in, layout_out, reduce, kind != "weighted", layout, hub)
    y = on_triton(merge_op, x, *args)
    assert_close(y, reference.merge(x.double(), *args), reference.merge(x, *args))
    assert torch.equal(on_triton(merge_op, x, *args), y)


@pytest.mark.parametrize(
    ("name", "dtype", "hub"),
    [("packed", torch.float32, True), ("vit", torch.bfloat16, True), ("packed", torch.float16, False)],
)
def test_maximum_and_its_gradient(device, name, dtype, hub):
    ((x, layout),) = [(case[1], case[3]) for case in feature_cases(dtype, device) if case[0] == name]
    # Few values: maxima tie, and the first token that attains one has its gradient.
    x = x.mul(2).round()
    x[1, -1], x[0, 0] = torch.nan, -torch.inf
    num_tokens = reference.tokens_of(x, layout).flatten(0, -2).shape[0]
    layout_in, layout_out, assign, alive, _ = random_assignment(num_tokens, device)
    args = merge_arguments(assign, alive, layout_in, layout_out, "max", True, layout, hub)
    y = on_triton(merge_op, x, *args)
    torch.testing.assert_close(y, reference.merge(x, *args), rtol=0, atol=0, equal_nan=True)
    grad = make_input("gaussian", y.shape, dtype=dtype, device=device, seed=15)
    backward = (grad, x, y, args[0], alive, layout)
    assert torch.equal(on_triton(max_backward_op, *backward), reference.max_backward(*backward))


@pytest.mark.no_poison
def test_offsets_past_two_to_the_31(device):
    """Frames 2^31 elements apart: only their pages are touched."""
    memory = torch.empty(2**31 + 2048, dtype=torch.float16, device=device)
    x = memory.as_strided((2, 25, 16), (2**31, 16, 1))
    x.copy_(make_input("gaussian", (2, 25, 16), dtype=torch.float16, device=device))
    near = x.clone()
    assert torch.equal(on_triton(head_mean_op, x, 2, []), on_triton(head_mean_op, near, 2, []))
    plan = on_triton(plan_merge, on_triton(head_mean_op, near, 2, []).view(2, 25, 8), target=6)
    for reduce in ("mean", "max"):
        assert torch.equal(
            on_triton(merge_tokens, x, plan, reduce=reduce), on_triton(merge_tokens, near, plan, reduce=reduce)
        )
    rows = x.transpose(0, 1)[:2, :, :].transpose(0, 1)[:, 0]
    assign = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    assert torch.equal(on_triton(gather_op, rows, assign, None, None, []), rows[assign.long()])


class Counted:
    """A kernel that notes its name at each launch."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def test_one_clip_takes_twelve_launches(device, monkeypatch):
    from lrc_kernels.tome import triton_groups, triton_kernels, triton_plan, triton_step

    launched = []
    for module in (triton_groups, triton_kernels, triton_plan, triton_step):
        for name in dir(module):
            if name.startswith("tome_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(name, getattr(module, name), launched))
    on_triton(compress_clips, make_input("gaussian", (1, 64, 32), device=device), 4, 2)
    assert len(launched) == 12 and sum("match" in name for name in launched) == 4
    launched.clear()
    on_triton(compress_clips, make_input("gaussian", (1, 49, 32), device=device), 4, 2)
    assert len(launched) == 16 and sum("rank" in name for name in launched) == 4


@pytest.mark.gpu
@pytest.mark.no_poison
def test_one_clip_is_one_cuda_graph_without_synchronisation(device):
    x = make_input("gaussian", (1, 2048, 1024), dtype=torch.bfloat16, device=device)
    for _ in range(3):
        on_triton(compress_clips, x, 128, 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_triton(compress_clips, x, 128, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_triton(compress_clips, x, 128, 16)
    x.copy_(make_input("gaussian", x.shape, dtype=x.dtype, device=device, seed=7))
    graph.replay()
    assert torch.equal(captured, on_triton(compress_clips, x, 128, 16))


def test_opcheck(device):
    x = make_input("gaussian", (2, 12, 8), device=device)
    plan = on_triton(plan_merge, x, target=3)
    cu = (plan.layout_in.cu_seqlens, plan.layout_out.cu_seqlens)
    y = on_triton(merge_tokens, x, plan, reduce="max").flatten(0, 1)
    budget = merge_budget(plan.layout_in, target=3)
    options = (None, "fp32", "reference", "reference", 1)
    calls = {
        "tome_head_mean_fwd": (x, 2, []),
        "tome_plan_fwd": (x.flatten(0, 1), *cu, budget.r, None, None, None, 6, 12, *options),
        "tome_merge_fwd": (x, plan.assign, plan.size, None, *cu, 6, 3, "max", True, []),
        "tome_merge_max_bwd": (y, x, y, plan.assign, None, []),
        "tome_gather_fwd": (y, plan.assign, plan.size, None, []),
    }
    with use_backend("triton"):
        for name, args in calls.items():
            torch.library.opcheck(getattr(torch.ops.lrc, name).default, args)


@pytest.mark.parametrize(("dtype", "binary"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("values", [(torch.nan,), (-torch.inf,), (torch.inf, -torch.inf), (torch.inf, torch.inf)])
def test_non_finite_features_stay_in_their_row(device, dtype, binary, values):
    x = make_input("gaussian", (90, 24), dtype=dtype, device=device, seed=12)
    layout_in, layout_out, assign, alive, weight = random_assignment(90, device)
    weight = alive if binary else weight
    assign[20:22], weight[20:22] = 3, 1.0
    weight[30] = 0
    size = torch.zeros(42, device=device).index_add(0, assign.long(), weight)
    cu = (layout_in.cu_seqlens, layout_out.cu_seqlens, 42, layout_in.max_seqlen)
    args = (assign, size, weight, *cu, "mean", binary, [])
    clean = on_triton(merge_op, x, *args)
    for i, value in enumerate(values):
        x[20 + i, 7] = value
    x[30, 8] = torch.nan
    y = on_triton(merge_op, x, *args)
    wanted = reference.merge(x.double(), *args)
    torch.testing.assert_close(y[3, 7].double(), wanted[3, 7], rtol=0, atol=0, equal_nan=True)
    y[3, 7] = clean[3, 7]
    assert torch.equal(y, clean)
    rows = on_triton(gather_op, x, torch.arange(90, device=device, dtype=torch.int32), None, weight, [])
    assert bool(rows[30].eq(0).all()) and int((~rows.isfinite()).sum()) == len(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_and_its_gradient(device, dtype):
    layout = TokenLayout(clip_frames=2, grid=(8, 12), shuffle=2, prefix=1)
    x = make_input("gaussian", (4, 97, 16), dtype=dtype, device=device, seed=13)
    results = {}
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend), record() as ran:
            y, plan = compress_clips(leaf, 7, 4, layout=layout, return_plan=True)
            y.float().square().sum().backward()
            back = unmerge_tokens(y, plan)
        # On a CPU the head mean, the plan and the merge are one op.
        assert {name for _, name in ran} == {backend} and len(ran) == (3 if x.device.type == "cpu" else 5)
        results[backend] = (plan, y.detach(), leaf.grad, back.detach())
    (plan, y, grad, back), (plan_, y_, grad_, back_) = results["triton"], results["reference"]
    assert_same_plan(plan, plan_)
    exact = on_reference(merge_tokens, x.double(), plan_, layout=layout)
    assert_close(y, exact, y_)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(grad, grad_, **tolerance)
    torch.testing.assert_close(back, back_, **tolerance)
    assert bool((grad[:, 0] == 0).all())


def test_empty_inputs(device):
    none = VarlenLayout([], device)
    empty = torch.zeros(0, 8, device=device)
    for layout in (none, VarlenLayout([0, 0], device)):
        plan = on_triton(plan_merge, empty, merge_budget(layout, r=[1]))
        assert plan.assign.shape == plan.size.shape == (0,)
        assert on_triton(merge_tokens, empty, plan).shape == (0, 8)
        assert on_triton(unmerge_tokens, empty, plan).shape == (0, 8)
    assert on_triton(head_mean_op, torch.zeros(2, 0, 8, device=device), 2, []).shape == (0, 4)
    one = on_triton(plan_merge, torch.ones(3, 1, 8, device=device), target=1)
    assert one.assign.tolist() == [0, 1, 2] and one.size.tolist() == [1, 1, 1]


def test_what_the_others_decline(device):
    x = make_input("gaussian", (1, 8, 4), device=device)
    plan = on_triton(plan_merge, x, r=2)
    with use_backend("triton"):
        for call in (lambda: head_mean_op(x.double(), 2, []), lambda: merge_tokens(x.double(), plan)):
            with pytest.raises(RuntimeError, match="float64"):
                call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thousands_of_infinities_in_one_row_keep_their_sign(device, dtype):
    x = torch.full((4101, 2), torch.inf, dtype=dtype, device=device)
    x[:, 1] = -torch.inf
    assign = torch.zeros(4101, dtype=torch.int32, device=device)
    cu_in, cu_out = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (4101, 1))
    size = torch.tensor([4101.0], device=device)
    y = on_triton(merge_op, x, assign, size, None, cu_in, cu_out, 1, 1, "mean", True, [])
    assert y.tolist() == [[torch.inf, -torch.inf]]
