# SPDX-License-Identifier: Apache-2.0
"""`apply_lrc_to_vit`: the model's own logits at r = 0, the published token counts, and an oracle of ToMe in a ViT.

Where timm imports, the tests of its `stand_in` run on it too.
"""

import copy
import importlib
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lrc_kernels.backend import record
from lrc_kernels.integrations import apply_lrc_to_vit
from lrc_kernels.integrations.vit import MergedTokens, merge_schedule_of
from tests.integrations.vit_stand_in import HEADS, WIDTH, StandIn


def spread(model):
    """Weights large enough that tokens differ and attention has a say."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model.eval()


def stand_in(num_tokens=197, **options):
    generator = torch.Generator().manual_seed(1)
    model = spread(StandIn(**options))
    x = torch.randn(2, num_tokens, WIDTH, generator=generator)
    return model, x


def transformers_vit(name, image_size=224, depth=24, **options):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install lrc-kernels[model])")
    config = {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "image_size": image_size,
        "patch_size": 16,
        **options,
    }
    if name == "InternVLVisionModel":
        config |= {"image_size": (image_size, image_size), "patch_size": (16, 16), "use_qk_norm": True}
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    x = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    return spread(cls(cls.config_class(**config))), x


def timm_vit(image_size=224, **options):
    try:
        timm = importlib.import_module("timm.models.vision_transformer")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm does not import here (it needs a torchvision that loads beside this torch): {error}")
    options = {"embed_dim": WIDTH, "depth": 24, "num_heads": HEADS, "num_classes": 10, **options}
    model = timm.VisionTransformer(img_size=image_size, patch_size=16, **options)
    x = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    return spread(model), x


MODELS = {
    "stand-in": stand_in,
    "stand-in with options": lambda: stand_in(qk_norm=True, init_values=0.5, num_prefix_tokens=5),
    "stand-in without class token": lambda: stand_in(num_prefix_tokens=0),
    "timm": timm_vit,
    "timm with options": lambda: timm_vit(qk_norm=True, init_values=0.5, reg_tokens=4, drop_path_rate=0.1),
    "ViT": lambda: transformers_vit("ViTForImageClassification"),
    "CLIP": lambda: transformers_vit("CLIPVisionModel"),
    "SigLIP": lambda: transformers_vit("SiglipVisionModel"),
    "InternVL": lambda: transformers_vit("InternVLVisionModel"),
    "DINOv2": lambda: transformers_vit("Dinov2Model", drop_path_rate=0.1),
}


def logits(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


def tokens_after(model, x):
    """[tokens after each block], read from what the blocks hand on."""
    lengths = []

    def note(module, arguments, out):
        lengths.append((out[0] if isinstance(out, tuple) else out).shape[1])

    handles = [module.register_forward_hook(note) for module in model.modules() if "forward" in module.__dict__]
    model(x)
    for handle in handles:
        handle.remove()
    return lengths


@pytest.mark.parametrize("name", MODELS)
def test_r_0_keeps_the_logits_and_undo_the_model(name):
    model, x = MODELS[name]()
    with torch.no_grad():
        wanted = logits(model, x)
        patch = apply_lrc_to_vit(model, r=0)
        with record() as ran:
            seen = logits(model, x)
        assert ran == [("attention_fwd", "cpu")] * 24
        torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-5)
        with apply_lrc_to_vit(model, r=8):
            merged = logits(model, x)
            assert merged.shape != wanted.shape or not torch.allclose(merged, wanted, rtol=1e-5, atol=1e-5)
        patch.undo()
        assert patch.model is model and not any("forward" in module.__dict__ for module in model.modules())
        assert torch.equal(logits(model, x), wanted)


# ViT-L's depth and tokens: 24 blocks, 197 tokens at 224 px and 577 at 384 px.
@pytest.mark.parametrize(("image_size", "r", "left"), [(224, 8, 7), (224, 7, 29), (384, 23, 25)])
@pytest.mark.parametrize("name", ["stand-in", "timm", "ViT"])
def test_published_token_counts(name, image_size, r, left):
    tokens = (image_size // 16) ** 2 + 1
    if name == "stand-in":
        model, x = stand_in(num_tokens=tokens)
    elif name == "timm":
        model, x = timm_vit(image_size)
    else:
        model, x = transformers_vit("ViTForImageClassification", image_size)
    apply_lrc_to_vit(model, r=r)
    with torch.no_grad(), record() as ran:
        lengths = tokens_after(model, x)
    assert lengths[:2] == [tokens - r, tokens - 2 * r] and lengths[-1] == left and len(lengths) == 24
    assert {backend for _, backend in ran} == {"cpu"} and ran.count(("tome_plan_fwd", "cpu")) == 24


def test_hidden_states_shrink_with_the_tokens():
    model, x = transformers_vit("ViTForImageClassification", depth=3)
    apply_lrc_to_vit(model, r=[10, 0, 5])
    assert [state.shape[1] for state in model(x, output_hidden_states=True).hidden_states] == [197, 187, 187, 182]


def oracle(model, x, schedule, protected, proportional):
    """ToMe in a ViT by the text of the paper, in fp64: softmax over logits + log(size), loops for the merge."""
    rows = []
    for tokens in x:
        size = torch.ones(len(tokens), dtype=torch.float64)
        for block, r in zip(model.blocks, schedule, strict=True):
            normed = block.norm1(tokens)
            q, k, v = block.attn.qkv(normed).unflatten(-1, (3, HEADS, -1)).unbind(1)
            scores = torch.einsum("qhd,khd->hqk", q, k) * block.attn.scale
            scores = scores + (size.log() if proportional else 0.0)
            out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            tokens = tokens + block.attn.proj(out)
            tokens, size = merged_by_loops(tokens, k.mean(1), size, min(r, (len(tokens) - protected) // 2), protected)
            tokens = tokens + block.mlp(block.norm2(tokens))
        rows.append(model.head(model.norm(tokens)[0] if protected else model.norm(tokens).mean(0)))
    return torch.stack(rows)


def merged_by_loops(tokens, metric, size, r, protected):
    if r <= 0:
        return tokens, size
    even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
    edges = []
    for i in even:
        cosines = [
            (float(torch.nn.functional.cosine_similarity(metric[i], metric[j], dim=0)), -j)
            for j in odd
            if j >= protected
        ]
        best, partner = max(cosines)
        edges.append((i < protected, -best, i, -partner))
    edges.sort()
    groups = {j: [j] for j in odd}
    for _, _, i, j in edges[:r]:
        groups[j].append(i)
    unmerged = [i for _, _, i, _ in edges[r:]]
    if protected:
        unmerged.sort()
    order = [[i] for i in unmerged] + [groups[j] for j in odd]
    order.sort(key=lambda group: group[0] >= protected)  # stable: the first tokens stay first
    weights = torch.zeros(len(order), len(tokens), dtype=torch.float64)
    for row, group in enumerate(order):
        weights[row, group] = size[group]
    return weights @ tokens / weights.sum(1, keepdim=True), weights.sum(1)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize(("protected", "r"), [(1, [4, 0, 3, 9]), (0, [5, 4, 2, 1]), (5, [3, 3, 3, 3])])
def test_equals_the_oracle(protected, r, proportional):
    model, x = stand_in(num_tokens=23, depth=4, num_prefix_tokens=protected)
    model, x = model.double(), x.double()
    with torch.no_grad():
        wanted = oracle(model, x, r, protected, proportional)
        apply_lrc_to_vit(model, r=r, proportional=proportional)
        torch.testing.assert_close(model(x), wanted, rtol=1e-6, atol=1e-6)
        # The kernels decide as fp64 does, and differ by what fp32 rounds.
        torch.testing.assert_close(model.float()(x.float()).double(), wanted, rtol=1e-3, atol=1e-4)


def test_sizes_travel_and_sum_to_the_tokens():
    model, x = stand_in()
    apply_lrc_to_vit(model, r=8)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _args, out: seen.append(out))
    model(x)
    assert all(isinstance(out, MergedTokens) for out in seen[:-1]) and isinstance(seen[-1], torch.Tensor)
    assert all(torch.equal(out.size.sum(1), torch.full((2,), 197.0)) for out in seen[:-1])
    assert all(torch.equal(out.size[:, 0], torch.ones(2)) for out in seen[:-1]), "the class token stays alone"


def test_batch_invariance_and_reentrance():
    model, x = stand_in(depth=6)
    apply_lrc_to_vit(model, r=16)
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), wanted, rtol=1e-5, atol=1e-5)
        results = {}
        # Other shapes in other threads at the same time: nothing about a call may live in the model.
        inputs = {n: x[:, : 197 - 10 * n] for n in range(4)}
        alone = {n: model(part) for n, part in inputs.items()}
        threads = [
            threading.Thread(target=lambda n=n, part=part: results.update({n: model(part).detach()}))
            for n, part in inputs.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(results[n], alone[n]) for n in inputs)


def test_training_and_recomputation_give_the_same_gradients():
    model, x = stand_in(depth=4)
    apply_lrc_to_vit(model, r=20)
    model.train()
    model(x).square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    assert all(grad.abs().sum() > 0 for grad in wanted)
    model.zero_grad()
    # Two forwards before either backward, every block recomputed.
    tokens = other = None
    for block in model.blocks:
        tokens = checkpoint(block, x if tokens is None else tokens, use_reentrant=False)
        other = checkpoint(block, x[:, :99] if other is None else other, use_reentrant=False)
    model.head(model.norm(tokens)[:, 0]).square().sum().backward()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), wanted, strict=True))


@pytest.mark.no_poison
def test_compiles_into_one_graph():
    torch._dynamo.reset()
    model, x = stand_in(depth=2)
    apply_lrc_to_vit(model, r=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


def test_autocast():
    model, x = stand_in(depth=4)
    apply_lrc_to_vit(model, r=8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.shape == (2, 10) and out.isfinite().all()


def test_a_replica_of_data_parallel_runs_its_own_parameters():
    model, x = stand_in(depth=1)
    patch = apply_lrc_to_vit(model, r=8)
    block = model.blocks[0]
    replica = block._replicate_for_data_parallel()
    replica.mlp = nn.Identity()
    with torch.no_grad():
        wanted = block(x)
        assert replica(x).shape == wanted.shape and not torch.equal(replica(x), wanted)
        assert torch.equal(block(x), wanted)
    patch.undo()
    assert "forward" not in block._replicate_for_data_parallel().__dict__


def test_no_clip_in_none_out():
    model, x = stand_in(depth=3)
    apply_lrc_to_vit(model, r=8)
    assert model(x[:0]).shape == (0, 10)


def test_adapters_around_the_projections_are_called():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.low_rank = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.low_rank(x)

    model, x = stand_in(depth=2)
    for block in model.blocks:
        block.attn.qkv = Adapter(block.attn.qkv)
    with torch.no_grad():
        wanted = model(x)
        apply_lrc_to_vit(model, r=0)
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_copy_is_a_model_of_its_own():
    model, x = stand_in(depth=2)
    apply_lrc_to_vit(model, r=8)
    with torch.no_grad():
        wanted = model(x)
        copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        model.blocks[0].mlp[0].weight.zero_()
        assert not torch.equal(model(x), wanted)
        assert torch.equal(copied(x), wanted) and torch.equal(pickled(x), wanted)


def test_a_second_patch_replaces_the_first_and_is_undone_alone():
    model, x = stand_in(depth=2)
    first = apply_lrc_to_vit(model, r=8)
    second = apply_lrc_to_vit(model, r=10)
    first.undo()
    assert tokens_after(model, x) == [187, 177]
    second.undo()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_schedules():
    assert merge_schedule_of(8, 3) == [8, 8, 8]
    assert merge_schedule_of([3, 2, 1], 3) == [3, 2, 1]
    assert merge_schedule_of((8, 0), 4) == [8, 8, 8, 8]
    assert merge_schedule_of((8, -1), 5) == [16, 12, 8, 4, 0]
    assert merge_schedule_of((8, 1), 5) == [0, 4, 8, 12, 16]
    assert merge_schedule_of((8, -1), 1) == [16]


def with_extra_part():
    model, _ = stand_in(depth=2)
    model.blocks[1].gate = nn.Linear(4, 4)
    return model


def with_other_attention():
    model, _ = stand_in(depth=2)
    model.blocks[0].attn = nn.Identity()
    return model


def with_hooked_forward():
    model, _ = stand_in(depth=2)
    model.blocks[1].forward = lambda x: x
    return model


BAD = {
    "no module": (lambda: apply_lrc_to_vit(3, r=1), TypeError, "model must be a torch.nn.Module, got int"),
    "no ViT": (lambda: apply_lrc_to_vit(nn.Linear(2, 2), r=1), ValueError, "list of ViT blocks.*got Linear"),
    "two ViTs": (
        lambda: apply_lrc_to_vit(nn.ModuleDict({"a": StandIn(1), "b": StandIn(1)}), r=1),
        ValueError,
        "one ViT, got a.blocks, b.blocks",
    ),
    "unknown part": (lambda: apply_lrc_to_vit(with_extra_part(), r=1), ValueError, "Block must consist.*also gate"),
    "other attention": (
        lambda: apply_lrc_to_vit(with_other_attention(), r=1),
        ValueError,
        "Block.attn must be Attention, got Identity",
    ),
    "hooked": (lambda: apply_lrc_to_vit(with_hooked_forward(), r=1), ValueError, "Block.forward must be its own"),
    "r": (lambda: apply_lrc_to_vit(StandIn(2), r="8"), TypeError, "r must be an int, a list.*got str"),
    "r negative": (lambda: apply_lrc_to_vit(StandIn(2), r=-1), ValueError, "r must be >= 0, got -1"),
    "r too short": (lambda: apply_lrc_to_vit(StandIn(2), r=[1]), ValueError, r"one entry per block \(2\), got 1"),
    "r of floats": (lambda: apply_lrc_to_vit(StandIn(2), r=[1, 2.5]), TypeError, r"r\[1\] must be an int, got float"),
    "inflect": (lambda: apply_lrc_to_vit(StandIn(2), r=(8, 2)), ValueError, "inflect <= 1, got"),
    "tuple": (lambda: apply_lrc_to_vit(StandIn(2), r=(8, 8, 8)), ValueError, "must be .r, inflect., got 3 entries"),
    "protected": (
        lambda: apply_lrc_to_vit(StandIn(2), r=1, num_protected=-1),
        ValueError,
        "num_protected must be >= 0, got -1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_refused_model_is_left_as_it_was():
    model = with_hooked_forward()
    with pytest.raises(ValueError, match="its own"):
        apply_lrc_to_vit(model, r=1)
    assert "forward" not in model.blocks[0].__dict__


def test_a_refused_second_patch_leaves_the_first():
    model, x = stand_in(depth=3)
    apply_lrc_to_vit(model, r=8)
    own = model.blocks[2].__dict__.pop("forward")
    model.blocks[2].forward = lambda x: x
    with pytest.raises(ValueError, match="its own"):
        apply_lrc_to_vit(model, r=1)
    model.blocks[2].forward = own
    assert tokens_after(model, x) == [189, 181, 173]


def test_what_a_merged_vit_cannot_do_raises():
    model, x = stand_in(depth=1, attn_drop=0.1)
    apply_lrc_to_vit(model, r=2)
    mask = torch.zeros(197, 197)
    with pytest.raises(ValueError, match="attention mask must be None"):
        model.blocks[0](x, attn_mask=mask)
    with pytest.raises(ValueError, match="attention mask must be None"):
        model.blocks[0](x, mask)
    with pytest.raises(ValueError, match="is_causal must be False"):
        model.blocks[0](x, is_causal=True)
    with pytest.raises(ValueError, match="attn_drop must be 0 in training, got 0.1"):
        model.train()(x)
    with pytest.raises(ValueError, match=r"must not be read as \[B, N, D\] where tokens merge"):
        MergedTokens(x, x[..., 0])[:, 1:]


# InternVL's encoder keeps from its blocks what it was asked for, which would come back empty.
@pytest.mark.parametrize("name", ["ViTForImageClassification", "InternVLVisionModel"])
def test_attention_weights_are_refused_however_they_are_asked_for(name):
    model, x = transformers_vit(name, depth=1, attn_implementation="eager")
    apply_lrc_to_vit(model, r=1)
    patch = apply_lrc_to_vit(model, r=2)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(x, output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="output_attentions must be False"):
        model(x)
    patch.undo()
    assert not model._forward_pre_hooks and len(model(x).attentions) == 1
