# SPDX-License-Identifier: Apache-2.0
"""The cost model over 8 to 1024 GPUs, beside published figures: `python -m lrc_kernels.sequence_parallel.simulate`.

In: a machine, attention shapes, tokens, phi (the sum of squared document lengths over the square of all rows: 1 for one
document). Out: time and TFLOP/s per GPU of one attention layer. Nothing here has been timed on a GPU by us.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from lrc_kernels.sequence_parallel.cost import (
    A100,
    ACTIVATION_BYTES,
    BACKWARD_FLOPS,
    GRADIENT_BYTES,
    H100,
    Hardware,
)
from lrc_kernels.sequence_parallel.heads import head_layout

HARDWARE = {"H100": H100, "A100": A100}
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
# Of rows that a rank sees, what the sparse exchange moves: measured on mixed video packs, 8 chunks a rank.
SPARSE_NEED = 0.15


@dataclass(frozen=True)
class Case:
    """One attention layer on P = ring * ulysses GPUs.

    Attributes:
        tokens: rows of the pack. phi: sum of squared lengths of its documents over tokens^2.
        transport: "ring", "gather", or "sparse", which moves `need` of what a ring moves.
        head_first: whether ulysses ranks are neighbours.
    """

    tokens: int
    ring: int
    ulysses: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    phi: float = 1.0
    transport: str = "ring"
    need: float = 1.0
    head_first: bool = True

    @property
    def flops(self) -> float:
        """Forward FLOP of one GPU: causal, so half of all pairs of a document."""
        pairs = self.phi * self.tokens**2 / 2
        return 4 * pairs * self.num_heads * self.head_dim / (self.ring * self.ulysses)


class Times(NamedTuple):
    """Seconds of one layer."""

    forward: float
    backward: float


def layer_time(case: Case, hardware: Hardware) -> Times:
    """Forward and backward of a balanced (zigzag or balanced) arrangement. Facts of the project, section 6."""
    heads = head_layout(case.num_heads, case.num_kv_heads, case.ulysses)
    width, rows = heads.num_q * case.head_dim, case.tokens / case.ring
    pairs = case.phi * case.tokens * rows / 2
    # Documents shorter than a shard leave a rank's keys at home.
    local_pairs = min(pairs, max(rows * rows / (2 * case.ring), min(1.0, case.phi) * rows * rows / 2))
    ring_stride, ulysses_stride = (case.ulysses, 1) if case.head_first else (1, case.ring)
    link = hardware.link(case.ring * ring_stride)
    passes = []
    for flops, gradient in ((1.0, 0), (BACKWARD_FLOPS / hardware.backward, GRADIENT_BYTES)):
        row = 2 * heads.num_kv * case.head_dim * (ACTIVATION_BYTES + gradient)
        if case.ring == 1:
            total = flops * hardware.compute(pairs, rows, width)
        elif case.transport == "ring":
            own = flops * hardware.compute(local_pairs, rows, width)
            # A step of a zigzag ring is half of the queries over all keys or all over half: 0.75 rows of keys each.
            seen = (pairs - local_pairs) / (case.ring - 1)
            step = flops * _block(hardware, seen, 0.75 * rows if case.phi == 1 else seen / rows, width)
            total = own + (case.ring - 1) * (max(step, rows * row / link) + hardware.latency)
        else:
            need = case.need if case.transport == "sparse" else 1.0
            own = flops * hardware.compute(local_pairs, rows, width)
            remote = flops * hardware.compute(pairs - local_pairs, rows, width)
            total = max(own, need * (case.ring - 1) * rows * row / link + hardware.latency) + remote
        local = case.tokens / (case.ring * case.ulysses) * case.head_dim * ACTIVATION_BYTES
        exchanged = local * (case.ulysses - 1) * (2 * heads.num_q + 2 * heads.num_kv)
        passes.append(total + hardware.all_to_all(exchanged, case.ulysses, ulysses_stride))
    return Times(*passes)


def _block(hardware: Hardware, pairs: float, keys: float, width: int) -> float:
    """Seconds for `pairs` pairs in blocks whose queries see `keys` keys."""
    return hardware.compute(pairs, pairs / max(keys, 1.0), width)


class Anchor(NamedTuple):
    """Published TFLOP/s per GPU at 8, 16, 32 and 64 GPUs; `within` is the error that we accept for the model."""

    name: str
    backward: bool
    phi: float
    kind: str
    published: tuple[float, ...]
    within: float


# MagiAttention's benchmark of context parallelism on H100, read off its figures (±2 %): 64 query and 8 KV heads of 128,
# bf16, 8192 tokens per GPU. phi of its packs is not published; 0.06 is what the facts give for packs of that kind.
ANCHORS = (
    Anchor("Ulysses, causal", False, 1.0, "ulysses", (601, 557, 580, 586), 0.06),
    Anchor("Ulysses, causal", True, 1.0, "ulysses", (582, 560, 573, 585), 0.06),
    Anchor("ring P2P, causal", False, 1.0, "ring", (421, 454, 451, 446), 0.08),
    Anchor("ring P2P, causal", True, 1.0, "ring", (432, 474, 470, 457), 0.12),
    Anchor("ring all-gather, causal", False, 1.0, "gather", (601, 591, 592, 580), 0.15),
    Anchor("ring all-gather, causal", True, 1.0, "gather", (516, 525, 521, 523), 0.15),
    Anchor("USP, causal", False, 1.0, "usp", (593, 589, 594, 586), 0.05),
    Anchor("USP, causal", True, 1.0, "usp", (571, 569, 573, 571), 0.05),
    Anchor("ring P2P, packs", False, 0.06, "ring", (89, 68, 47, 28), 0.50),
    Anchor("ring P2P, packs", True, 0.06, "ring", (97, 86, 57, 29), 0.50),
)
ANCHOR_SIZES = (8, 16, 32, 64)


def anchor_case(anchor: Anchor, num_gpus: int) -> Case:
    """The case that a published figure was measured on."""
    ulysses = {"ulysses": num_gpus, "usp": 8}.get(anchor.kind, 1)
    transport = "gather" if anchor.kind == "gather" else "ring"
    return Case(8192 * num_gpus, num_gpus // ulysses, ulysses, 64, 8, phi=anchor.phi, transport=transport)


def teraflops(case: Case, times: Times, backward: bool) -> float:
    """TFLOP/s per GPU of one pass."""
    flops, seconds = (BACKWARD_FLOPS * case.flops, times.backward) if backward else (case.flops, times.forward)
    return flops / seconds / 1e12


def anchor_rows() -> Iterator[tuple[Anchor, int, float, float, float]]:
    """(anchor, GPUs, published, model, relative difference) of every published figure."""
    for anchor in ANCHORS:
        for num_gpus, published in zip(ANCHOR_SIZES, anchor.published, strict=True):
            case = anchor_case(anchor, num_gpus)
            model = teraflops(case, layer_time(case, H100), anchor.backward)
            yield anchor, num_gpus, published, model, model / published - 1


class Throughput(NamedTuple):
    """Published iterations/s of one layer on 8 GPUs of one node: forward, and forward + backward where published."""

    name: str
    hardware: Hardware
    batch: int
    case: Case
    published: tuple[float, ...]
    within: float


def _yunchang(ulysses: int, tokens: int, heads: tuple[int, int], published: tuple[float, ...]) -> Throughput:
    name = f"yunchang, {tokens >> 10}K, {heads[0]}:{heads[1]} heads, ulysses {ulysses}"
    return Throughput(name, A100, 2, Case(tokens, 8 // ulysses, ulysses, *heads), published, 0.12)


# yunchang's figures of 8 A100 (zigzag, q, k, v apart), heads of 128; ring-flash-attn's table (zigzag, 8K tokens a GPU).
# Its H800 ran FlashAttention-2, at half of what our H100 stands for.
THROUGHPUTS = (
    *(
        _yunchang(ulysses, 32768, (64, 8), published)
        for ulysses, published in ((1, (34.1, 9.64)), (2, (39.3, 10.6)), (4, (41.1, 11.3)), (8, (40.4, 11.4)))
    ),
    *(
        _yunchang(ulysses, 131072, (8, 8), published)
        for ulysses, published in ((1, (17.8,)), (2, (21.2,)), (4, (21.5,)), (8, (21.0,)))
    ),
    Throughput("ring-flash-attn, A100", A100, 1, Case(65536, 8, 1, 32, 8), (38.2, 10.6), 0.12),
    Throughput("ring-flash-attn, H800", H100, 1, Case(65536, 8, 1, 32, 8), (63.0, 17.4), 0.12),
)


def throughput(anchor: Throughput) -> tuple[float, ...]:
    """Iterations/s by the model, of what was published."""
    times = layer_time(anchor.case, anchor.hardware)
    return tuple(1 / anchor.batch / seconds for seconds in (times.forward, sum(times))[: len(anchor.published)])


def best_split(tokens: int, num_gpus: int, hardware: Hardware, **case: float) -> tuple[Case, Times]:
    """The fastest (ring, ulysses, placement, transport) for one layer, forward and backward."""
    fastest: tuple[Case, Times] | None = None
    phi = float(case.pop("phi", 1.0))
    heads = {name: int(value) for name, value in case.items()}
    for ulysses in (u for u in range(1, heads["num_heads"] + 1) if num_gpus % u == 0):
        for head_first in (True, False):
            for transport in ("ring", "sparse", "gather"):
                need = SPARSE_NEED if phi < 1 else 0.8
                tried = Case(tokens, num_gpus // ulysses, ulysses, phi=phi, transport=transport, need=need,
                             head_first=head_first, **heads)  # fmt: skip
                times = layer_time(tried, hardware)
                if fastest is None or sum(times) < sum(fastest[1]):
                    fastest = tried, times
    assert fastest is not None
    return fastest


def main(arguments: list[str] | None = None) -> None:
    """Print the anchors beside the model, then times by number of GPUs; `--plot FILE` draws both."""
    parser = argparse.ArgumentParser(prog="python -m lrc_kernels.sequence_parallel.simulate", description=main.__doc__)
    parser.add_argument("--hardware", choices=sorted(HARDWARE), default="H100")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("Q", "KV"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--phi", type=float, default=1.0, help="1 for one document, 0.02 to 0.1 for packs of videos")
    parser.add_argument("--plot", metavar="FILE", help="PNG or SVG; needs matplotlib")
    options = parser.parse_args(arguments)
    print_anchors()
    num_heads, num_kv_heads = options.heads
    shapes = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": options.head_dim}
    hardware = HARDWARE[options.hardware]
    print(f"\n{options.hardware}, {options.tokens} tokens, {num_heads}:{num_kv_heads} heads of {options.head_dim}, "
          f"phi {options.phi}: ms per layer, forward + backward")  # fmt: skip
    print(f"{'GPUs':>5} {'pure ring':>10} {'best':>8}  split")
    for num_gpus in SIZES:
        ring = Case(options.tokens, num_gpus, 1, phi=options.phi, **shapes)
        best, times = best_split(options.tokens, num_gpus, hardware, phi=options.phi, **shapes)
        placement = "head_first" if best.head_first else "context_first"
        print(f"{num_gpus:>5} {sum(layer_time(ring, hardware)) * 1e3:>10.2f} {sum(times) * 1e3:>8.2f}  "
              f"ring {best.ring} x ulysses {best.ulysses}, {best.transport}, {placement}")  # fmt: skip
    if options.plot:
        plot(options.plot, hardware, replace(Case(options.tokens, 1, 1, phi=options.phi, **shapes)))


def print_anchors() -> None:
    """The model beside every published figure; a line that it does not reproduce says so."""
    print("Published TFLOP/s per GPU (MagiAttention's benchmark, H100, 64:8 heads of 128, 8K tokens per GPU) | model")
    by_anchor: dict[Anchor, list[tuple[float, float, float]]] = {}
    for anchor, _, published, model, difference in anchor_rows():
        by_anchor.setdefault(anchor, []).append((published, model, difference))
    for anchor, rows in by_anchor.items():
        worst = max(abs(difference) for *_, difference in rows)
        cells = "  ".join(f"{published:>4.0f}|{model:<4.0f}" for published, model, _ in rows)
        direction = "backward" if anchor.backward else "forward"
        print(f"{anchor.name:<24} {direction:<8} {cells}  worst {worst:>4.0%}, {_verdict(worst, anchor.within)}")
    print("\nPublished iterations/s on 8 GPUs, forward and forward + backward | model")
    for other in THROUGHPUTS:
        pairs = list(zip(other.published, throughput(other), strict=True))
        worst = max(abs(y / x - 1) for x, y in pairs)
        cells = "  ".join(f"{x:>5.1f}|{y:<5.1f}" for x, y in pairs)
        print(f"{other.name:<38} {cells:<24} worst {worst:>4.0%}, {_verdict(worst, other.within)}")


def _verdict(worst: float, within: float) -> str:
    return f"within {within:.0%}" if worst <= within else f"NOT reproduced within {within:.0%}"


def plot(path: str, hardware: Hardware, case: Case) -> None:
    """Published figures beside the model, and time by number of GPUs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(17, 4.5))
    for number, measured in enumerate(a for a in ANCHORS if not a.backward):
        model = [teraflops(c, layer_time(c, H100), False) for c in (anchor_case(measured, n) for n in ANCHOR_SIZES)]
        left.plot(ANCHOR_SIZES, model, color=f"C{number}", label=f"{measured.name}, model")
        left.plot(ANCHOR_SIZES, measured.published, "o", color=f"C{number}")
    left.set(xscale="log", xlabel="GPUs", ylabel="TFLOP/s per GPU", title="Forward: published (dots) and model (lines)")
    for number, anchor in enumerate(THROUGHPUTS):
        middle.loglog(anchor.published, throughput(anchor), "os"[number % 2], color=f"C{number}", label=anchor.name)
    middle.axline((10, 10), (100, 100), color="0.7")
    middle.set(xlabel="published iterations/s", ylabel="model", title="8 GPUs: forward, and forward + backward")
    shapes = {"num_heads": case.num_heads, "num_kv_heads": case.num_kv_heads, "head_dim": case.head_dim}
    ring = [sum(layer_time(replace(case, ring=n), hardware)) * 1e3 for n in SIZES]
    best = [sum(best_split(case.tokens, n, hardware, phi=case.phi, **shapes)[1]) * 1e3 for n in SIZES]
    right.loglog(SIZES, ring, label="pure ring")
    right.loglog(SIZES, best, label="best split")
    right.set(xlabel="GPUs", ylabel="ms per layer", title=f"{hardware.name}, {case.tokens} tokens, phi {case.phi}")
    for axes in (left, middle, right):
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
