# SPDX-License-Identifier: Apache-2.0
"""Every op once, forward and backward, on the backends named, at aligned and odd sizes, against the fp64 reference:

    python tools/sanitize.py cuda                    # in one process, as compute-sanitizer wants it
    python tools/sanitize.py --each aten cuda triton # each op and backend in a process of its own

What a backend does not take is named and left out. The exit code is 1 where a result is wrong, or none came from a
backend. With --each a crash, an illegal access or a hang of one op leaves the others as they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from lrc_kernels import VarlenLayout, backend
from lrc_kernels.attention import merge_partials, varlen_attention, varlen_attention_forward
from lrc_kernels.testing import assert_close, assert_equal_index
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

Calls = dict[str, Callable[[], Tensor]]
SIZES = ((64, 128), (37, 52))
PROCESS_SECONDS = 120


class Inputs:
    """Random leaves that hold the same numbers of `dtype` on every device, and in a wider `compute` dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str = "cpu", compute: torch.dtype | None = None):
        self.dtype, self.device, self.compute = dtype, device, compute or dtype
        self.random = torch.Generator().manual_seed(2)

    def features(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.dtype).to(self.device, self.compute).requires_grad_()

    def numbers(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.random).to(self.device)


def attention_calls(inputs: Inputs, tokens: int, width: int) -> Calls:
    features, device = inputs.features, inputs.device
    layout = VarlenLayout([tokens, 1, tokens // 2], device)
    rows = layout.num_tokens
    q, k, v = features(rows, 4, width), features(rows, 2, width), features(rows, 2, width)
    equal_k, equal_v = features(rows, 4, width), features(rows, 4, width)
    out, lse = (x.detach() for x in varlen_attention_forward(q, k, v, cu_seqlens_q=layout))
    asking, sequence, position = query_rows(layout)
    budget = drop_budget(layout, [tokens, 0, tokens // 2 - 1], keep=[tokens // 2, 0, 5])
    droppable = torch.ones(rows, device=device, dtype=torch.bool)
    droppable[tokens] = droppable[-1] = False
    scores = inputs.numbers(rows)
    selection = select_tokens(layout, droppable, budget, mode="topk", scores=scores)
    residual, weight = features(rows, 2 * width), features(2 * width)
    ids = {"cu_seqlens_k": layout, "query_sequence": sequence, "query_position": position}
    whole, steps = (
        VarlenLayout([rows], device),
        {"cu_seqlens_q": VarlenLayout([1, 1, 1], device), "cu_seqlens_k": layout},
    )
    return {
        "varlen_attention": lambda: varlen_attention(q, k, v, cu_seqlens_q=layout),
        "varlen_attention, window": lambda: varlen_attention(q, k, v, cu_seqlens_q=layout, window=(9, 0)),
        "varlen_attention, one sequence": lambda: varlen_attention(q, equal_k, equal_v, cu_seqlens_q=whole),
        "varlen_attention, lse": lambda: varlen_attention_forward(q, k, v, cu_seqlens_q=layout)[1].to(q.dtype),
        "varlen_attention, decode": lambda: varlen_attention(q[:3], k, v, **steps),
        "varlen_attention, decode, lse": lambda: varlen_attention_forward(q[:3], k, v, **steps)[1].to(q.dtype),
        "merge_partials": lambda: merge_partials(out, lse, out, lse)[0],
        "attention_scores": lambda: attention_scores(q[asking], k, **ids),
        "attention_column_sums": lambda: attention_column_sums(q, k, lse, cu_seqlens_q=layout, cu_seqlens_k=layout),
        "select_tokens, topk": lambda: select_tokens(layout, droppable, budget, mode="topk", scores=scores).indices,
        "select_tokens, random": lambda: select_tokens(layout, droppable, budget, mode="random").indices,
        "drop_tokens": lambda: drop_tokens((residual, q), selection)[0],
        "drop_tokens_rmsnorm": lambda: drop_tokens_rmsnorm(residual, weight, 1e-6, selection)[1],
    }


def tome_calls(inputs: Inputs, tokens: int, width: int) -> Calls:
    features, device = inputs.features, inputs.device
    layout = TokenLayout(clip_frames=2, grid=(4, 6), shuffle=2, prefix=1)
    x, vit = features(2, tokens, width), features(4, 25, width)
    metric, vit_metric = (m.detach() for m in (head_mean(x, 4), head_mean(vit, 4, layout=layout)))
    y = features(16, width)
    plan, vit_plan = plan_merge(metric, target=8), plan_merge(vit_metric, target=4)
    ragged = merge_budget(VarlenLayout([2 * tokens - 3, 0, 3], device), r=[9, tokens // 2], num_protected=1)
    weights = inputs.numbers(2 * tokens)
    protected = torch.arange(2 * tokens, device=device) == 7
    destination = torch.arange(2 * tokens, device=device) % 4 == 2
    # Long enough for two blocks of a cluster, for shared memory to be used again, for several windows of rows.
    clip, clip_metric = features(1, 600, width), inputs.numbers(1, 600, 136) - 0.5
    clip_plan = plan_merge(clip_metric, r=280)
    return {
        "head_mean": lambda: head_mean(x, 4),
        "head_mean in place": lambda: head_mean(vit, 4, layout=layout),
        "plan_merge": lambda: plan_merge(metric, target=8).size,
        "plan_merge, protected, by position": lambda: (
            plan_merge(metric.flatten(0, 1), ragged, size=weights, protected=protected, order="position").size
        ),
        "plan_merge, destination, threshold": lambda: (
            plan_merge(metric, r=tokens // 4, destination=destination, threshold=0.1).size
        ),
        # Scores that round to one bf16 number tie, so that which tokens merge is no matter of being right.
        "plan_merge, bf16": lambda: plan_merge(metric, r=tokens // 4, precision="bf16").size.sum(),
        "plan_merge, long": lambda: plan_merge(clip_metric, r=280).size,
        "plan_merge, long, halved": lambda: plan_merge(clip_metric, r=[300, 150]).size,
        "plan_merge, long, bf16": lambda: plan_merge(clip_metric, r=280, precision="bf16").size.sum(),
        "merge_tokens": lambda: merge_tokens(x, plan),
        "merge_tokens, long": lambda: merge_tokens(clip, clip_plan),
        "merge_tokens, max": lambda: merge_tokens(x, plan, reduce="max"),
        "merge_tokens in place": lambda: merge_tokens(vit, vit_plan, layout=layout),
        "unmerge_tokens": lambda: unmerge_tokens(y, plan),
    }


def all_calls(inputs: Inputs, tokens: int, width: int) -> Calls:
    """Title -> an op of the library, whose arguments the references made."""
    with backend.use_backend("reference"):
        return {**tome_calls(inputs, tokens, width), **attention_calls(inputs, tokens, width)}


def leaves_of(y: Tensor) -> list[Tensor]:
    """The tensors that a gradient of y reaches, in an order that the op decides and not its backend."""
    nodes, leaves = [y.grad_fn], []
    for node in nodes:
        leaves += [node.variable] if hasattr(node, "variable") else []
        nodes += [after for after, _ in node.next_functions if after is not None and after not in nodes]
    return leaves


def results_of(call: Callable[[], Tensor], name: str, title: str) -> list[Tensor]:
    """The result on that backend and its gradients; fewer, or none, where the backend does not take the call."""
    results: list[Tensor] = []
    try:
        with backend.use_backend(name):
            y = call()
            results.append(y.detach())
            if y.requires_grad:
                upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, y.dtype)
                results += torch.autograd.grad(y, leaves_of(y), upstream)
    except RuntimeError as error:
        if "was forced but cannot take this call" not in str(error):
            raise
        print(f"{title}{', backward' if results else ''}: left out: {error}")
    return results


def check(name: str, only: str | None, dtype: torch.dtype, tokens: int, width: int, device: torch.device | str) -> int:
    """Op calls that ran on that backend, all of them right. References run on the CPU, which no kernel can spoil."""
    exact, same = (all_calls(Inputs(dtype, "cpu", wide), tokens, width) for wide in (torch.float64, dtype))
    ran_on = 0
    for op, call in all_calls(Inputs(dtype, device), tokens, width).items():
        if only not in (None, op):
            continue
        title = f"{op}, {dtype}, N {tokens}"
        with backend.record() as ran:
            got = results_of(call, name, title)
        ran_on += sum(used == name for _, used in ran)
        for index, actual in enumerate(got):
            wanted, in_dtype = (results_of(calls[op], "reference", title)[index] for calls in (exact, same))
            part = f"{title}, {f'gradient {index}' if index else 'result'}"
            if actual.is_floating_point():
                assert_close(actual, wanted.double(), in_dtype, name=part)
            else:
                assert_equal_index(actual, wanted, name=part)
    return ran_on


def check_all(name: str, only: str | None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ran_on = 0
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, width in SIZES:
            ran_on += check(name, only, dtype, tokens, width, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{ran_on} op calls ran on {name}")
    return ran_on


def check_each(names: list[str], ops: list[str]) -> int:
    """Prints a line per op and backend as it ends, and returns how many failed; as one more, a backend without any."""

    def run(name: str, op: str) -> str:
        started = time.monotonic()
        command = [sys.executable, __file__, name, "--op", op]
        try:
            process = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_SECONDS)
            said, errors, ended = process.stdout, process.stderr, process.returncode
        except subprocess.TimeoutExpired:
            said, errors, ended = "", f"hangs: stopped after {PROCESS_SECONDS} s", 1
        absent = said.endswith(f"\n0 op calls ran on {name}\n")
        verdict = "left out" if absent else "FAILED" if ended else "ok"
        reason = f": exit {ended}: {[said, *errors.strip().splitlines()][-1]}" if verdict == "FAILED" else ""
        print(f"{verdict:<8} {name} {op} {time.monotonic() - started:.0f} s{reason}", flush=True)
        return verdict

    pairs = [(name, op) for op in ops for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = list(pool.map(lambda pair: run(*pair), pairs))
    failed = verdicts.count("FAILED")
    print(f"{failed} of {len(pairs)} pairs of op and backend failed")
    absent = [name for i, name in enumerate(names) if len(ops) > 1 and set(verdicts[i :: len(names)]) == {"left out"}]
    if absent:
        print(f"FAILED   no op ran on {', '.join(absent)}")
    return failed + len(absent)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="+", choices=backend.ORDER)
    parser.add_argument("--each", action="store_true", help="every op and backend in a process of its own")
    parser.add_argument("--op", help="this op alone, by its title")
    options = parser.parse_args(arguments)
    ops = list(all_calls(Inputs(torch.float32), *SIZES[0]))
    if options.op is not None and options.op not in ops:
        parser.error(f"--op must be one of {', '.join(ops)}, got {options.op}")
    if options.each:
        return 1 if check_each(options.backends, [options.op] if options.op else ops) else 0
    return 0 if all(check_all(name, options.op) for name in options.backends) else 1


if __name__ == "__main__":
    sys.exit(main())
