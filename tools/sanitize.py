# SPDX-License-Identifier: Apache-2.0
"""The short list for compute-sanitizer: `python tools/sanitize.py BACKEND` runs every op forward and backward on that
backend, at aligned and odd sizes, and fails where no op ran on it. Ops that it does not have are named and left out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from lrc_kernels import VarlenLayout, backend
from lrc_kernels.attention import merge_partials, varlen_attention, varlen_attention_forward
from lrc_kernels.token_dropout import (
    attention_column_sums,
    attention_scores,
    drop_budget,
    drop_tokens,
    drop_tokens_rmsnorm,
    query_rows,
    select_tokens,
)
from lrc_kernels.tome import TokenLayout, head_mean, merge_budget, merge_tokens, plan_merge, unmerge_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def attention_calls(dtype: torch.dtype, tokens: int, width: int) -> dict[str, Callable[[], Tensor]]:
    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=True)

    layout = VarlenLayout([tokens, 1, tokens // 2], DEVICE)
    rows = layout.num_tokens
    q, k, v = features(rows, 4, width), features(rows, 2, width), features(rows, 2, width)
    out, lse = (x.detach() for x in varlen_attention_forward(q, k, v, cu_seqlens_q=layout))
    asking, sequence, position = query_rows(layout)
    budget = drop_budget(layout, [tokens, 0, tokens // 2 - 1], keep=[tokens // 2, 0, 5])
    droppable = torch.ones(rows, device=DEVICE, dtype=torch.bool)
    droppable[tokens] = droppable[-1] = False
    scores = torch.randn(rows, device=DEVICE)
    selection = select_tokens(layout, droppable, budget, mode="topk", scores=scores)
    residual, weight = features(rows, 2 * width), features(2 * width)
    ids = {"cu_seqlens_k": layout, "query_sequence": sequence, "query_position": position}
    return {
        "varlen_attention": lambda: varlen_attention(q, k, v, cu_seqlens_q=layout),
        "varlen_attention, window": lambda: varlen_attention(q, k, v, cu_seqlens_q=layout, window=(9, 0)),
        "merge_partials": lambda: merge_partials(out, lse, out, lse)[0],
        "attention_scores": lambda: attention_scores(q[asking], k, **ids),
        "attention_column_sums": lambda: attention_column_sums(q, k, lse, cu_seqlens_q=layout, cu_seqlens_k=layout),
        "select_tokens, topk": lambda: select_tokens(layout, droppable, budget, mode="topk", scores=scores).indices,
        "select_tokens, random": lambda: select_tokens(layout, droppable, budget, mode="random").indices,
        "drop_tokens": lambda: drop_tokens((residual, q), selection)[0],
        "drop_tokens_rmsnorm": lambda: drop_tokens_rmsnorm(residual, weight, 1e-6, selection)[1],
    }


def tome_calls(dtype: torch.dtype, tokens: int, width: int) -> dict[str, Callable[[], Tensor]]:
    def features(*shape: int) -> Tensor:
        return torch.randn(*shape, device=DEVICE, dtype=dtype, requires_grad=True)

    layout = TokenLayout(clip_frames=2, grid=(4, 6), shuffle=2, prefix=1)
    x, vit = features(2, tokens, width), features(4, 25, width)
    metric, vit_metric = (m.detach() for m in (head_mean(x, 4), head_mean(vit, 4, layout=layout)))
    y = features(16, width)
    plan, vit_plan = plan_merge(metric, target=8), plan_merge(vit_metric, target=4)
    ragged = merge_budget(VarlenLayout([2 * tokens - 3, 0, 3], DEVICE), r=[9, tokens // 2], num_protected=1)
    weights = torch.rand(2 * tokens, device=DEVICE)
    protected = torch.arange(2 * tokens, device=DEVICE) == 7
    destination = torch.arange(2 * tokens, device=DEVICE) % 4 == 2
    # Long enough for two blocks of a cluster, for shared memory to be used again, for several windows of rows.
    clip, clip_metric = features(1, 600, width), torch.randn(1, 600, 136, device=DEVICE)
    clip_plan = plan_merge(clip_metric, r=280)
    return {
        "head_mean": lambda: head_mean(x, 4),
        "head_mean in place": lambda: head_mean(vit, 4, layout=layout),
        "plan_merge": lambda: plan_merge(metric, target=8).size,
        "plan_merge, protected, by position": lambda: (
            plan_merge(metric.flatten(0, 1), ragged, size=weights, protected=protected, order="position").size
        ),
        "plan_merge, destination, threshold": lambda: (
            plan_merge(metric, r=tokens // 4, destination=destination, threshold=0.1, precision="bf16").size
        ),
        "plan_merge, long": lambda: plan_merge(clip_metric, r=[280, 100]).size,
        "plan_merge, long, bf16": lambda: plan_merge(clip_metric, r=280, precision="bf16").size,
        "merge_tokens": lambda: merge_tokens(x, plan),
        "merge_tokens, long": lambda: merge_tokens(clip, clip_plan),
        "merge_tokens, max": lambda: merge_tokens(x, plan, reduce="max"),
        "merge_tokens in place": lambda: merge_tokens(vit, vit_plan, layout=layout),
        "unmerge_tokens": lambda: unmerge_tokens(y, plan),
    }


def forced(name: str, call: Callable[[], Tensor | None], title: str) -> Tensor | None:
    """The call's result with the backend forced, or None where that backend does not have the op."""
    try:
        with backend.use_backend(name):
            return call()
    except RuntimeError as error:
        if "was forced but cannot take this call" not in str(error):
            raise
        print(f"{title}: left out: {error}")
        return None


def main(name: str) -> int:
    ran_on = 0
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, width in ((64, 128), (37, 52)):
            for op, call in {**tome_calls(dtype, tokens, width), **attention_calls(dtype, tokens, width)}.items():
                title = f"{op}, {dtype}, N {tokens}"
                with backend.record() as ran:
                    y = forced(name, call, title)
                    loss = (call() if y is None else y).float().square().sum()
                    if loss.requires_grad:
                        forced(name, loss.backward, f"{title}, backward")
                ran_on += sum(used == name for _, used in ran)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{ran_on} op calls ran on {name}")
    return 0 if ran_on else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
