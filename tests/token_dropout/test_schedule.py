# SPDX-License-Identifier: Apache-2.0
"""DropoutSchedule: what it plans for a pack, what it refuses, and the rows that ask for scores."""

import types

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.token_dropout import DropoutSchedule, drop_position_ids, query_rows, select_tokens


def schedule(**changed):
    fields = {"layers": (2, 5), "keep_ratios": (0.5, 0.25), "kinds": ("linspace", "attention")}
    return DropoutSchedule(**{**fields, **changed})


def test_ratios_are_of_the_first_count():
    layout = VarlenLayout([13, 5, 0, 7])
    first, second = schedule().plan(layout, [11, 0, 0, 6])
    assert first.keep.tolist() == [5, 0, 0, 3] and first.layout_out.lengths == (7, 5, 0, 4)
    assert second.keep.tolist() == [2, 0, 0, 1] and second.layout_out.lengths == (4, 5, 0, 2)
    assert second.layout_in == first.layout_out and second.num_kept == 11 and second.max_seqlen == 5
    assert (first.layer, second.layer, first.positions) == (2, 5, "keep")


def test_a_ratio_of_one_keeps_everything():
    (budget,) = DropoutSchedule((1,), (1.0,), ("random",)).plan(VarlenLayout([4, 3]), [4, 2])
    assert budget.layout_out == budget.layout_in
    assert DropoutSchedule.none().plan(VarlenLayout([4]), [4]) == ()


def test_bernoulli_counts_are_those_of_the_selection():
    layout = VarlenLayout([200, 30, 90])
    droppable = torch.rand(320, generator=torch.Generator().manual_seed(1)) < 0.8
    droppable[[0, 200, 230]] = False
    counts = [int(part.sum()) for part in droppable.split(layout.lengths)]
    ids = torch.tensor([7, 1 << 40, 3])
    options = {"seed": 5, "sequence_ids": ids}
    first, second, third = DropoutSchedule.paper().plan(layout, counts, droppable=droppable, **options)
    assert DropoutSchedule.paper().modes == ("random", "topk", "topk")
    selection = select_tokens(layout, droppable, first, mode="random", **options)
    assert selection.layout.lengths == first.layout_out.lengths and selection.num_kept == first.num_kept
    drawn = select_tokens(layout, droppable, keep=0.5, mode="bernoulli", layer=8, **options)
    assert torch.equal(selection.indices, drawn.indices)
    kept = [int(part.sum()) for part in droppable[selection.indices.long()].split(selection.layout.lengths)]
    assert second.keep.tolist() == [min(int(n * 0.25), left) for n, left in zip(counts, kept, strict=True)]
    assert third.layout_in == second.layout_out
    with pytest.raises(ValueError, match="droppable must be given"):
        DropoutSchedule.paper().plan(layout, counts)


def test_videochat_flash():
    default = DropoutSchedule.videochat_flash()
    assert (default.layers, default.keep_ratios) == ((8, 16, 24), (0.5, 0.25, 0.125))
    assert default.kinds == ("attention",) * 3 and default.positions == "renumber"
    config = {
        "llm_compress_type": "uniform0_attention",
        "llm_compress_layer_list": [4, 18],
        "llm_image_token_ratio_list": [1, 0.75, 0.25],
    }
    for form in (config, types.SimpleNamespace(**config), {"llm_compress_type": "uniform0_attention"}):
        read = DropoutSchedule.videochat_flash(form)
        assert (read.layers, read.keep_ratios, read.kinds) == ((4, 18), (0.75, 0.25), ("linspace", "attention"))
    assert DropoutSchedule.videochat_flash({**config, "llm_compress_type": "uniform1_attention"}).kinds[1] == "linspace"
    with pytest.raises(ValueError, match="llm_image_token_ratio_list must hold 1.0"):
        DropoutSchedule.videochat_flash({**config, "llm_image_token_ratio_list": [0.75, 0.25]})
    with pytest.raises(ValueError, match="llm_compress_type must be one of"):
        DropoutSchedule.videochat_flash({"llm_compress_type": "fastv"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (5, 5)}, "layers must increase, got \\[5, 5\\]"),
        ({"layers": (-1, 5)}, "layers\\[0\\] must be >= 0, got -1"),
        ({"keep_ratios": (0.5, 0.0)}, "keep_ratios\\[1\\] must be in \\(0, 1\\], got 0.0"),
        ({"keep_ratios": (1.5, 0.5)}, "keep_ratios\\[0\\] must be in"),
        ({"keep_ratios": (float("nan"), 0.5)}, "keep_ratios\\[0\\] must be in"),
        ({"keep_ratios": (0.25, 0.5)}, "keep_ratios are shares of the original tokens and must not increase"),
        ({"kinds": ("linspace", "fastv")}, "kinds\\[1\\] must be one of"),
        ({"kinds": ("linspace",)}, "one entry per layer, got 2 layers, 2 keep_ratios and 1 kinds"),
        ({"positions": "shift"}, "positions must be one of keep, renumber"),
    ],
)
def test_bad_schedules(change, message):
    with pytest.raises(ValueError, match=message):
        schedule(**change)


def test_bad_types():
    with pytest.raises(TypeError, match="keep_ratios\\[0\\] must be a number, got str"):
        schedule(keep_ratios=("half", 0.25))
    with pytest.raises(TypeError, match="num_droppable\\[1\\] must be an int, got float"):
        schedule().plan(VarlenLayout([4, 4]), [3, 2.5])


def test_what_a_pack_or_a_model_refuses():
    with pytest.raises(ValueError, match="layers must be < num_layers = 5, got \\[2, 5\\]"):
        schedule().validate(5)
    schedule().validate(6)
    with pytest.raises(ValueError, match="keep must leave every sequence a row"):
        schedule().plan(VarlenLayout([1, 4]), [1, 2])
    with pytest.raises(ValueError, match="num_droppable"):
        schedule().plan(VarlenLayout([4]), [5])
    with pytest.raises(ValueError, match="a bernoulli drop must be the first"):
        schedule(kinds=("linspace", "bernoulli")).plan(VarlenLayout([4]), [3], droppable=torch.ones(4).bool())


def test_query_rows_against_a_loop():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(0, 9, (int(torch.randint(1, 6, (), generator=random)),), generator=random).tolist()
        layout = VarlenLayout(lengths)
        targets = torch.where(torch.rand(sum(lengths), generator=random) < 0.5, -100, 3)
        for max_answers in (1, 3):
            rows, sequence, position = query_rows(layout, targets, max_answers=max_answers)
            assert rows.numel() == 0 or 0 <= int(rows.min()) <= int(rows.max()) < max(sum(lengths), 1)
            wanted = []
            for s, part in enumerate(targets.split(lengths)):
                values = [-100, *part.tolist()]
                begins = [i for i in range(len(part)) if values[i + 1] != -100 and values[i] == -100]
                begins = (begins or [len(part) - 1])[:max_answers]
                wanted += [(s, at) for at in begins + [-1] * (max_answers - len(begins))]
            assert list(zip(sequence.tolist(), position.tolist(), strict=True)) == wanted
            exists = position >= 0
            starts = layout.cu_seqlens.long()[sequence.long()]
            assert torch.equal(rows[exists], (starts + position)[exists])


def test_query_rows_at_inference_and_bad_targets():
    rows, sequence, position = query_rows(VarlenLayout([3, 0, 2]))
    assert (rows[[0, 2]].tolist(), sequence.tolist(), position.tolist()) == ([2, 4], [0, 1, 2], [2, -1, 1])
    assert query_rows(VarlenLayout([]))[0].numel() == 0
    with pytest.raises(ValueError, match="targets must hold one value per token \\(5\\)"):
        query_rows(VarlenLayout([3, 2]), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="targets must be one of int64, int32"):
        query_rows(VarlenLayout([2]), torch.zeros(2))


def test_position_ids_after_a_drop():
    layout = VarlenLayout([5, 3])
    droppable = torch.tensor([0, 1, 1, 1, 0, 1, 1, 0]).bool()
    selection = select_tokens(layout, droppable, keep=1, mode="linspace")
    position_ids = torch.tensor([10, 11, 12, 13, 14, 0, 1, 2])
    assert drop_position_ids(position_ids, selection, "keep").tolist() == [10, 11, 14, 0, 2]
    assert drop_position_ids(position_ids, selection, "renumber").tolist() == [0, 1, 2, 0, 1]
    three = torch.stack([position_ids, position_ids + 1, position_ids + 2])
    assert torch.equal(drop_position_ids(three, selection, "keep"), three[:, selection.indices.long()])
    with pytest.raises(ValueError, match="positions must be 'keep'"):
        drop_position_ids(three, selection, "renumber")
    with pytest.raises(ValueError, match="position_ids must have 8 rows in its last dimension"):
        drop_position_ids(torch.arange(99), selection, "keep")
    with pytest.raises(TypeError, match="position_ids must be one of int64, int32"):
        drop_position_ids(position_ids.float(), selection, "keep")
