# SPDX-License-Identifier: Apache-2.0
"""`apply_tome_to_diffusers` on a stand-in for diffusers' blocks against loops in fp64, and, where they are installed,
on a UNet of diffusers against tomesd itself."""

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lrc_kernels.backend import record
from lrc_kernels.integrations import apply_tome_to_diffusers
from lrc_kernels.integrations.diffusers import window_destinations


class SelfAttention(nn.Module):
    """diffusers' Attention as a block calls it."""

    def __init__(self, dim):
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
        q, k, v = self.to_qkv(hidden_states).chunk(3, -1)
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask))


class BasicTransformerBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn1 = SelfAttention(dim)
        self.ff = nn.Linear(dim, dim)

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None):
        normed = self.norm1(hidden_states)
        hidden_states = self.attn1(normed, encoder_hidden_states=None, attention_mask=attention_mask) + hidden_states
        return self.ff(self.norm3(hidden_states)) + hidden_states


class StandIn(nn.Module):
    """A UNet of two resolutions, without convolutions: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, dim=8):
        super().__init__()
        self.fine, self.coarse = BasicTransformerBlock(dim), BasicTransformerBlock(dim)

    def forward(self, sample, timestep=None):
        height, width = sample.shape[2:]
        fine = self.fine(sample.flatten(2).mT)
        image = fine.mT.unflatten(2, (height, width))
        small = nn.functional.avg_pool2d(image, 2, ceil_mode=True)
        coarse = self.coarse(small.flatten(2).mT).mT.unflatten(2, small.shape[2:])
        return image + nn.functional.interpolate(coarse, size=(height, width))


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return StandIn().eval()


def plans_of(unet):
    return [module.forward.args[0].made for module in (unet.fine, unet.coarse)]


def test_ratio_0_and_undo_change_nothing(unet, random):
    x = torch.randn(2, 8, 8, 8, generator=random)
    with torch.no_grad():
        wanted = unet(x)
        patch = apply_tome_to_diffusers(unet, ratio=0)
        assert torch.equal(unet(x), wanted)
        with apply_tome_to_diffusers(unet, ratio=0.5):
            assert not torch.allclose(unet(x), wanted)
        patch.undo()
        assert torch.equal(unet(x), wanted)
        assert not unet._forward_hooks and not unet._forward_pre_hooks


def test_windows_hold_one_destination_each():
    for grid, sx, sy in (((6, 8), 2, 2), ((7, 9), 2, 2), ((6, 9), 3, 2), ((1, 4), 2, 2)):
        generator = torch.Generator().manual_seed(3)
        seen = set()
        for _ in range(40):
            chosen = window_destinations(grid, sx=sx, sy=sy, generator=generator).view(grid)
            windows = chosen[: grid[0] // sy * sy, : grid[1] // sx * sx]
            assert chosen.sum() == windows.sum() == (grid[0] // sy) * (grid[1] // sx)
            counts = windows.unflatten(0, (-1, sy)).unflatten(2, (-1, sx)).sum((1, 3)) if windows.numel() else windows
            assert (counts == 1).all()
            seen |= {tuple(place) for place in windows[:sy, :sx].nonzero().tolist()}
        assert len(seen) == (sx * sy if windows.numel() else 0), "every place of a window is drawn"
        top_left = window_destinations(grid, sx=sx, sy=sy).view(grid)
        assert torch.equal(top_left.nonzero() % torch.tensor([sy, sx]), torch.zeros_like(top_left.nonzero()))


def naive_attention(block, x, destination, r):
    """One image's tokens [N, C]: merge by loops, attend, unmerge."""
    sources = [i for i in range(len(x)) if not destination[i]]
    receivers = [i for i in range(len(x)) if destination[i]]
    edges = []
    for i in sources:
        cosines = [float(torch.nn.functional.cosine_similarity(x[i], x[j], dim=0)) for j in receivers]
        best = max(cosines)
        edges.append((-best, i, receivers[cosines.index(best)]))
    edges.sort()
    groups = [[i] for _, i, _ in edges[r:]] + [[j, *(i for _, i, k in edges[:r] if k == j)] for j in receivers]
    normed = block.norm1(x)
    out = block.attn1(torch.stack([normed[group].mean(0) for group in groups])[None])[0]
    attended = torch.empty_like(x)
    for row, group in enumerate(groups):
        attended[group] = out[row]
    return attended


@pytest.mark.parametrize(("ratio", "sx", "sy"), [(0.5, 2, 2), (0.75, 2, 2), (0.99, 3, 2), (0.3, 2, 1)])
def test_equals_the_loops(unet, random, ratio, sx, sy):
    block, grid = unet.double().fine, (6, 7)
    x = torch.randn(2, 8, *grid, generator=random, dtype=torch.float64)
    tokens = x.flatten(2).mT
    destination = window_destinations(grid, sx=sx, sy=sy, generator=torch.Generator().manual_seed(7))
    r = min(int(42 * ratio), int((~destination).sum()))
    with torch.no_grad():
        hidden = torch.stack([naive_attention(block, image, destination, r) for image in tokens]) + tokens
        wanted = block.ff(block.norm3(hidden)) + hidden
        seen = []
        apply_tome_to_diffusers(unet, ratio, sx=sx, sy=sy, generator=torch.Generator().manual_seed(7))
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
        unet(x)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-6, atol=1e-6)
    assert plans_of(unet)[1] is None, "the coarse block lies beyond max_downsample=1"


def test_blocks_within_max_downsample_merge(unet, random):
    apply_tome_to_diffusers(unet, 0.5, max_downsample=2)
    with record() as ran:
        unet(torch.randn(2, 8, 9, 12, generator=random))
    assert [plan.layout_in.max_seqlen - plan.layout_out.max_seqlen for plan in plans_of(unet)] == [54, 15]
    names = ["tome_head_mean_fwd", "tome_plan_fwd", "tome_merge_fwd", "tome_merge_fwd", "tome_gather_fwd"]
    assert ran == [(name, "cpu") for name in names * 2]


def test_a_plan_serves_reuse_steps(unet, random):
    x = torch.randn(2, 8, 8, 8, generator=random)
    apply_tome_to_diffusers(unet, 0.5, reuse_steps=3)
    plans = []
    for _ in range(7):
        unet(x)
        plans.append(plans_of(unet)[0])
    assert [plan is plans[0] for plan in plans] == [True] * 3 + [False] * 4
    assert plans[3] is plans[5] and plans[6] is not plans[5]
    assert not torch.equal(plans[0].assign, plans[3].assign), "destinations are drawn anew"
    unet(x[:, :, :4])
    assert plans_of(unet)[0].layout_in.max_seqlen == 32, "another image size makes another plan"


class Pipeline:
    """diffusers' pipelines as far as a run of theirs goes: the scheduler sets its timesteps, the UNet sees them."""

    def __init__(self, unet):
        self.unet, self.scheduler = unet, SimpleNamespace(timesteps=torch.arange(3, -1, -1))

    def __call__(self, x, timesteps, by_keyword=False):
        self.scheduler.timesteps = torch.tensor(timesteps)
        plans = []
        for t in self.scheduler.timesteps:
            self.unet(x, timestep=t) if by_keyword else self.unet(x, t)
            plans.append(plans_of(self.unet)[0])
        return plans


@pytest.mark.parametrize("by_keyword", [False, True])
def test_no_plan_goes_from_one_run_to_the_next(unet, random, by_keyword):
    x, pipe = torch.randn(2, 8, 8, 8, generator=random), Pipeline(unet)
    apply_tome_to_diffusers(pipe, 0.5, reuse_steps=9)
    runs = [pipe(x, timesteps, by_keyword) for timesteps in ([9, 5, 5, 1], [9, 5], [4, 1], [1], [1])]
    assert all(plan is run[0] for run in runs for plan in run), "a repeated timestep (Heun, PNDM) is no new run"
    assert len({id(run[0]) for run in runs}) == 5
    # Without a pipeline the timesteps alone tell, whatever type they have.
    apply_tome_to_diffusers(unet, 0.5, reuse_steps=9)
    plans = []
    for timestep in (9, 5.0, torch.tensor([1, 1]), torch.tensor(7.0), 3, None, 2):
        unet(x, timestep)
        plans.append(plans_of(unet)[0])
    assert [plan is plans[0] for plan in plans] == [True] * 3 + [False] * 4
    assert all(plan is plans[3] for plan in plans[3:])


def test_reset_begins_a_run(unet, random):
    x = torch.randn(2, 8, 8, 8, generator=random)
    patch = apply_tome_to_diffusers(unet, 0.5, reuse_steps=9)
    unet(x)
    first = plans_of(unet)[0]
    patch.reset()
    unet(x)
    assert plans_of(unet)[0] is not first


@pytest.mark.no_poison
def test_compiles_into_one_graph_for_all_steps(unet, random):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for cls in (BasicTransformerBlock, SelfAttention):
        torch._dynamo.allow_in_graph(cls)  # as diffusers does with its own
    x = torch.randn(2, 8, 8, 8, generator=random)
    apply_tome_to_diffusers(unet, 0.5, random=False, reuse_steps=2)
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = copy.deepcopy(unet)(x)
        for timestep in (7, 7, 5, 3):
            torch.testing.assert_close(compiled(x, torch.tensor(timestep)), wanted, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one makes the plans, another takes them"


def test_a_copy_brings_no_pipeline(unet, random):
    pipe = Pipeline(unet)
    pipe.decoder = nn.Linear(3, 3)
    apply_tome_to_diffusers(pipe, 0.5, reuse_steps=2)
    x = torch.randn(2, 8, 8, 8, generator=random)
    with torch.no_grad():
        pipe(x, [3, 2])
        copied, pickled = copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))
        wanted = unet(x, 1)
        assert torch.equal(copied(x, 1), wanted) and torch.equal(pickled(x, 1), wanted)
        session = copied.fine.forward.args[0].session
        assert session.pipe is None and session is not unet.fine.forward.args[0].session
        assert session.age == 1, "the copy's hooks are its own session's"


def test_randomness_is_the_generators_and_the_batch_shares_it(unet, random):
    x = torch.randn(1, 8, 8, 8, generator=random).expand(4, -1, -1, -1)

    def run(batch, **options):
        with apply_tome_to_diffusers(unet, 0.5, **options):
            out = unet(x[:batch])
            return out, plans_of(unet)[0]

    before = torch.get_rng_state()
    (first, plan), (again, _), (other, _) = (
        run(4, generator=torch.Generator().manual_seed(seed)) for seed in (11, 11, 12)
    )
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(first[0], image) for image in first[1:])
    anchors = plan.anchor.view(4, -1)
    assert all(torch.equal(anchors[0], image) for image in anchors[1:])
    # A batch of odd size may lack a prompt's pair, so that it must not draw.
    corner = run(2, random=False)[0]
    torch.testing.assert_close(run(1)[0], corner[:1])
    assert not torch.allclose(run(2)[0][:1], corner[:1])


def test_65536_tokens(unet, random):
    """2,048 x 2,048 pixels: 49,152 sources and 16,384 destinations, whose scores would take 3.2 GB."""

    class Light(nn.Module):
        def forward(self, hidden_states, **options):
            assert hidden_states.shape == (1, 32768, 8)
            return hidden_states

    unet.fine.attn1, unet.coarse = Light(), nn.Identity()
    apply_tome_to_diffusers(unet, 0.5)
    # Four colours, so that all that merge are alike and every token gets back what it was.
    colours = torch.eye(8)[torch.randint(4, (64, 64), generator=random)]
    colours = colours.repeat_interleave(4, 0).repeat_interleave(4, 1)
    x = colours.permute(2, 0, 1)[None]
    block = unet.fine
    with torch.no_grad():
        tokens = x.flatten(2).mT
        hidden = block.norm1(tokens) + tokens
        wanted = block.ff(block.norm3(hidden)) + hidden
        seen = []
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
        unet(x)
    # A colour's first destination takes thousands of sources, whose fp32 sum rounds as often.
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-3)


def test_a_block_that_never_merges_is_said(unet, random):
    class Coarse(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, sample):
            return self.block(nn.functional.avg_pool2d(sample, 2).flatten(2).mT)

    model = Coarse(unet.coarse)
    apply_tome_to_diffusers(model, 0.5)
    with pytest.warns(UserWarning, match="no block merged.*SDXL needs max_downsample=2"):
        model(torch.randn(2, 8, 8, 8, generator=random))


def test_a_pipeline_is_known_by_its_unet(unet):
    pipe = Pipeline(unet)
    patch = apply_tome_to_diffusers(pipe, 0.5)
    assert patch.model is pipe and "forward" in unet.fine.__dict__


def test_gradients_flow(unet, random):
    apply_tome_to_diffusers(unet, 0.5)
    x = torch.randn(2, 8, 6, 6, generator=random, requires_grad=True)
    unet(x).square().sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in unet.fine.parameters())


BAD = {
    "no module": (lambda unet: apply_tome_to_diffusers("sd"), TypeError, "pipe must be.*or have a unet, got str"),
    "no blocks": (lambda unet: apply_tome_to_diffusers(nn.ReLU()), ValueError, "BasicTransformerBlock, got ReLU"),
    "ratio": (lambda unet: apply_tome_to_diffusers(unet, 1.0), ValueError, "0 <= ratio < 1, got 1.0"),
    "sx": (lambda unet: apply_tome_to_diffusers(unet, sx=0), ValueError, "sx must be >= 1, got 0"),
    "steps": (lambda unet: apply_tome_to_diffusers(unet, reuse_steps=0), ValueError, "reuse_steps must be >= 1, got 0"),
    "generator": (
        lambda unet: apply_tome_to_diffusers(unet, generator=3),
        TypeError,
        "generator must be a torch.Generator, got int",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(unet, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(unet)


def test_what_cannot_run_raises(unet, random):
    apply_tome_to_diffusers(unet, 0.5)
    with pytest.raises(ValueError, match="must run inside of its UNet"):
        unet.fine(torch.ones(1, 16, 8))
    with pytest.raises(ValueError, match=r"latent \[B, C, H, W\], got \[2, 3\]"):
        unet(torch.ones(2, 3))
    unet(torch.randn(2, 8, 4, 4, generator=random))
    with pytest.raises(ValueError, match="mask of self-attention must be None"):
        unet.fine(torch.randn(2, 16, 8, generator=random), attention_mask=torch.zeros(16, 16))
    with pytest.raises(ValueError, match="4 x 4 tokens of its latent, got 15"):
        unet.fine(torch.randn(2, 15, 8, generator=random))


def test_a_forward_that_was_replaced_is_refused(unet):
    unet.coarse.attn1.forward = lambda x: x
    with pytest.raises(ValueError, match="SelfAttention.forward must be its own"):
        apply_tome_to_diffusers(unet, 0.5)
    assert "forward" not in unet.fine.__dict__ and not unet._forward_hooks


def test_a_refused_second_patch_leaves_the_first(unet, random):
    apply_tome_to_diffusers(unet, 0.5, generator=torch.Generator().manual_seed(2), reuse_steps=9)
    x = torch.randn(2, 8, 8, 8, generator=random)
    with torch.no_grad():
        wanted = unet(x)
        own = unet.coarse.attn1.__dict__.pop("forward")
        unet.coarse.attn1.forward = lambda x: x
        with pytest.raises(ValueError, match="SelfAttention.forward must be its own"):
            apply_tome_to_diffusers(unet, 0.7)
        unet.coarse.attn1.forward = own
        assert torch.equal(unet(x), wanted) and len(unet._forward_hooks) == 1


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(2, 16, 16), (1, 16, 16), (4, 8, 24)])
def test_live_parity_with_tomesd(shape, ratio):
    """Two denoising steps on diffusers' own UNet, destinations drawn from the same seed."""
    tomesd = pytest.importorskip("tomesd", reason="tomesd is not installed (pip install tomesd diffusers)")
    try:
        diffusers = importlib.import_module("diffusers")
        cls = diffusers.UNet2DConditionModel
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"diffusers does not import here: {error}")
    torch.manual_seed(0)
    ours = cls(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    theirs = copy.deepcopy(ours)
    x, prompt = torch.randn(shape[0], 4, *shape[1:]), torch.randn(shape[0], 5, 8)
    torch.manual_seed(5)
    tomesd.apply_patch(theirs, ratio=ratio)
    patch = apply_tome_to_diffusers(ours, ratio, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for step in (3, 2):
            wanted = theirs(x, step, prompt).sample
            torch.testing.assert_close(ours(x, step, prompt).sample, wanted, rtol=1e-4, atol=1e-4)
        patch.undo()
        assert not torch.allclose(ours(x, step, prompt).sample, wanted, rtol=1e-4, atol=1e-4)
