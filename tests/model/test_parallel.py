# SPDX-License-Identifier: Apache-2.0
"""LRCModel over real gloo processes against one process in fp64: loss, gradients and the selection of every drop."""

import functools

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lrc_kernels.backend import record
from lrc_kernels.packing import pack_samples
from lrc_kernels.sequence_parallel import make_mesh, sum_gradients, sum_over_ranks
from lrc_kernels.sequence_parallel.mesh import ranks_of
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.config import tiny
from lrc_model.model import LRCModel
from lrc_model.parallel import SequenceParallel
from tests.model.samples import make_sample
from tests.sequence_parallel.posts import counted_posts

SCHEDULES = {
    "linspace": DropoutSchedule((0,), (0.5,), ("linspace",), "renumber"),
    "random": DropoutSchedule((1,), (0.5,), ("random",)),
    "bernoulli then attention": DropoutSchedule((0, 1), (0.6, 0.3), ("bernoulli", "attention")),
    "attention": DropoutSchedule((0, 1), (0.5, 0.25), ("attention", "attention"), "renumber"),
    "none": None,
}
MESHES = {}


def mesh_of(dp, ring, ulysses):
    key = dp, ring, ulysses
    if key not in MESHES:
        MESHES[key] = make_mesh("cpu", dp=dp, ring=ring, ulysses=ulysses)
    return MESHES[key]


def make_model(schedule):
    config = tiny().override({"dropout": SCHEDULES[schedule], "num_layers": 2, "text.max_position": 40})
    model = LRCModel.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


# Frames and words of the samples of four packs: ragged, one of text, one short enough to lie on one rank, one without
# any frames and one with fewer clips than ranks.
PACKS = (((24, 17), (0, 9), (4, 7)), ((8, 11), (0, 30)), ((0, 12),), ((12, 14),))


def packs():
    """The packs of one step, whose loss weights sum to 1."""
    samples = [[make_sample(frames, 10 * i + j + 1, words) for j, (frames, words) in enumerate(pack)]
               for i, pack in enumerate(PACKS)]  # fmt: skip
    weight = 1 / (4 * sum(map(len, PACKS)))
    return [pack_samples(group, clip_frames=4, token_weight=weight) for group in samples]


@functools.cache
def one_process(schedule):
    """Loss, gradients and rows that are left, as one process has them."""
    model = make_model(schedule)
    outs = [model(batch, seed=5) for batch in packs()]
    loss = sum(out.loss for out in outs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, [kept(out) for out in outs]


def kept(out):
    return out.rows.layout.lengths, out.rows.token_positions.tolist(), out.rows.position_ids.tolist()


def many_processes(schedule, dp, ring, ulysses, form="clips", **options):
    """Of this rank: worst relative errors of loss and gradients, and whether what is left is what one process has."""
    mesh, batches = mesh_of(dp, ring, ulysses), packs()
    loss, gradients, left = one_process(schedule)
    model = make_model(schedule)
    parallel = SequenceParallel(model.config.text, mesh, **options)
    mine = range(mesh.get_local_rank("dp"), len(batches), dp)
    outs = []
    for index in mine:
        batch = batches[index]
        if form == "shard":
            rank = mesh.get_local_rank("ring") * ulysses + mesh.get_local_rank("ulysses")
            count = len(batch.frames) // 4
            batch = batch.shard(parallel.local_indices(batch.layout), range(count)[rank :: ring * ulysses])
        outs.append(model(batch, seed=5, parallel=parallel, recompute=form == "recompute"))
    local = sum(out.loss for out in outs)
    local.backward()
    sum_gradients(model.parameters(), mesh)
    total = sum_over_ranks(local, mesh)
    errors = {"loss": abs(total - loss) / loss}
    largest = max(float(grad.norm()) for grad in gradients.values() if grad is not None)
    for name, p in model.named_parameters():
        if p.grad is None or gradients[name] is None:
            assert p.grad is None and gradients[name] is None, name
            continue
        # The gradient of a bias of keys is zero but for rounding.
        scale = gradients[name].norm().clamp(min=1e-6 * largest)
        errors[name] = (p.grad - gradients[name]).norm() / scale
    worst = max(errors, key=errors.get)
    return worst, float(errors[worst]), [kept(out) == left[i] for i, out in zip(mine, outs, strict=True)]


# Pools of four ranks are there already; two of their own cost their start.
DEGREES = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
DEGREES += [pytest.param(degrees, marks=pytest.mark.slow) for degrees in ((1, 2, 1), (1, 1, 2))]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
def test_loss_and_gradients_of_one_process(rank_pools, degrees):
    """dp, ring and ulysses over the packs of a step, whose loss weights sum to 1; every kind of drop."""
    dp, ring, ulysses = degrees
    for schedule in SCHEDULES:
        for name, error, same in rank_pools(dp * ring * ulysses).run(many_processes, schedule, *degrees):
            assert error <= 1e-12, (schedule, name, error)
            assert all(same), schedule


@pytest.mark.parametrize("form", ["shard", "recompute"])
def test_shards_of_the_batch_and_layers_computed_again(rank_pools, form):
    for name, error, same in rank_pools(4).run(many_processes, "bernoulli then attention", 1, 2, 2, form):
        assert error <= 1e-12 and all(same), (name, error)


def test_forced_arrangements_and_transports(rank_pools):
    for arrangement, transport in (("contiguous", "ring"), ("zigzag_per_seq", "gather")):
        run = rank_pools(4).run(partial_many, arrangement, transport)
        for name, error, same in run:
            assert error <= 1e-12 and all(same), (arrangement, name, error)


def partial_many(arrangement, transport):
    return many_processes("attention", 1, 2, 2, arrangement=arrangement, transport=transport)


def sent_by_recompute(schedule):
    """Messages, bytes, and how often rows were scored and selected in forward and backward of a model, plain and with
    layers computed again."""
    mesh, batch = mesh_of(1, 2, 2), packs()[0]
    found = []
    for recompute in (False, True):
        model = make_model(schedule)
        before = ranks_of(mesh).bytes_sent
        with counted_posts() as posts, record() as ran:
            parallel = SequenceParallel(model.config.text, mesh)
            model(batch, seed=5, parallel=parallel, recompute=recompute).loss.backward()
        names = [name for name, _ in ran]
        decided = names.count("select_tokens_fwd"), names.count("attention_block_scores_fwd")
        found.append((posts.count, ranks_of(mesh).bytes_sent - before, *decided))
    return found


@pytest.mark.parametrize("schedule", ["none", "attention"])
def test_layers_computed_again_send_nothing_again(rank_pools, schedule):
    for plain, again in rank_pools(4).run(sent_by_recompute, schedule):
        assert plain == again
        assert min(plain[:2]) > 0 and plain[2:] == ((2, 2) if schedule == "attention" else (0, 0))


def refusals():
    mesh, model = mesh_of(2, 2, 1), make_model("none")
    batch, other = packs()[:2]
    parallel = SequenceParallel(model.config.text, mesh)
    rows = parallel.local_indices(batch.layout)
    rank = mesh.get_local_rank("ring")
    messages = []
    for call in (
        lambda: model(3, parallel=parallel),
        lambda: SequenceParallel(model.config, mesh),
        lambda: SequenceParallel(model.config.text, None),
        lambda: model(batch.shard(rows.flip(0), [0]), parallel=parallel),
        lambda: model(batch.shard(rows), parallel=parallel),
        lambda: model(batch.shard(rows, [0]), parallel=parallel),
        lambda: model(batch if rank else other, parallel=parallel),
        lambda: model(batch.shard(rows, [2 * rank])),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_what_is_no_pack_of_this_mesh_is_named(rank_pools):
    wanted = ("batch must be a PackedBatch, got int", "text must be a TextConfig, got LRCConfig",
              "mesh must be a DeviceMesh, got NoneType", "batch must be the shard of this rank's rows",
              "got a shard with clips=None", "clips must be on one rank each, got row 2 on more than one",
              "batch must be the same pack on all ranks", "got the shard of a sequence-parallel rank")  # fmt: skip
    for messages in rank_pools(4).run(refusals):
        for message, pattern in zip(messages, wanted, strict=True):
            assert pattern in message


def lacking_a_clip():
    mesh, model, batch = mesh_of(2, 2, 1), make_model("none"), packs()[0]
    parallel = SequenceParallel(model.config.text, mesh)
    rank = mesh.get_local_rank("ring")
    with pytest.raises(ValueError, match="clips must hold all clips"):
        model(batch.shard(parallel.local_indices(batch.layout), [rank]), parallel=parallel)


def test_a_clip_that_no_rank_encodes_is_missed(rank_pools):
    rank_pools(4).run(lacking_a_clip)


def fully_sharded():
    """FSDP2 over all ranks of the mesh: its gradients are sums where it is told to divide by 1."""
    mesh, (_, gradients, _) = mesh_of(1, 2, 2), one_process("attention")
    model = make_model("attention")
    ranks = mesh._flatten("fsdp")
    for layer in model.language_model.model.layers:
        fully_shard(layer, mesh=ranks)
        layer.set_gradient_divide_factor(1.0)
    parallel = SequenceParallel(model.config.text, mesh)
    local = sum(model(batch, seed=5, parallel=parallel).loss for batch in packs())
    local.backward()
    sum_gradients([p for p in model.parameters() if not isinstance(p, DTensor)], mesh)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}
    largest = max(float(grad.norm()) for grad in found.values())
    return max(float((grad - gradients[name]).norm()) for name, grad in found.items()) / largest, len(found)


def test_with_layers_sharded_by_fsdp(rank_pools):
    for error, _ in rank_pools(4).run(fully_sharded):
        assert error <= 1e-12
