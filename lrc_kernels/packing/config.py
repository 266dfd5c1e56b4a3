# SPDX-License-Identifier: Apache-2.0
"""What a plan is asked for: the budgets and strategy of its packs, and what a sample costs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from lrc_kernels.checks import check_choice, check_int

STRATEGIES = ("in_order", "open_best_fit", "first_fit", "best_fit", "bfd")
_OVERLONG = ("error", "drop", "truncate_text", "reduce_frames", "split")
# Sums of two lengths stay inside int64.
_LARGEST = 1 << 62


@dataclass(frozen=True)
class CostModel:
    """Cost of a sample of L tokens: a * L + b * L^2 + v * frames; a pack costs the sum over its samples.

    The square stays inside a sample because attention does. Any unit will do: FLOPs, or seconds that were measured.

    Args:
        a: cost per token.
        b: cost per squared token.
        v: cost per frame, before the LLM sees its tokens.

    Raises:
        TypeError: values that are no numbers. ValueError: values that are negative or not finite, or all zero.
    """

    a: float
    b: float
    v: float

    def __post_init__(self) -> None:
        for name in ("a", "b", "v"):
            _check_number(name, getattr(self, name), minimum=0.0)
        if self.a == self.b == self.v == 0:
            raise ValueError("one of a, b and v must be above 0, got zeros")

    @classmethod
    def for_model(
        cls, *, hidden_size: int, num_layers: int, num_params: float, vit_flops: float = 0.0, train_vit: bool = True
    ) -> CostModel:
        """FLOPs of a training step: forward and twice that for the backward.

        Args:
            hidden_size: query heads times head dim of the LLM.
            num_layers: layers of the LLM.
            num_params: parameters of the LLM that a token passes: 6 FLOPs each.
            vit_flops: FLOPs of the vision tower's forward pass over one frame.
            train_vit: False where the vision tower is frozen and has no backward pass.
        """
        check_int("hidden_size", hidden_size, minimum=1)
        check_int("num_layers", num_layers, minimum=1)
        # The causal half of Q K^T and P V: 2 * hidden_size * L^2 forward.
        return cls(a=6.0 * num_params, b=6.0 * hidden_size * num_layers, v=(3.0 if train_vit else 1.0) * vit_flops)

    @classmethod
    def internvideo2_5_8b(cls) -> CostModel:
        """InternLM2.5-7B and InternViT-300M at 448 px (1025 tokens, 24 layers, width 1024), both trained."""
        vit_flops = 2 * 1025 * 304e6 + 4 * 1025**2 * 1024 * 24
        return cls.for_model(hidden_size=4096, num_layers=32, num_params=7.36e9, vit_flops=vit_flops)

    def cost(self, num_tokens: npt.NDArray[np.int64], num_frames: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """float64 [n], by the same roundings on every machine."""
        tokens = num_tokens.astype(np.float64)
        cost = self.b * tokens
        cost += self.a
        cost *= tokens
        cost += self.v * num_frames
        return cost


@dataclass(frozen=True)
class PackConfig:
    """How samples are packed. README.md compares the strategies.

    Args:
        max_tokens: tokens of a pack.
        max_frames: frames of a pack, or None.
        max_cost: cost of a pack by `cost_model`, or None; "1.05x" is 1.05 times the cost of max_tokens average tokens.
        strategy: "in_order" (the paper's), "open_best_fit", "first_fit", "best_fit" or "bfd".
        open_packs: packs that open_best_fit keeps open.
        window: samples that first_fit and best_fit choose from, and that bfd sorts at a time; many packs should fit it.
        overlong: what happens to a sample that fits no pack: "error" or "drop". "truncate_text", "reduce_frames" and
            "split" name what is done where lengths are made; a plan changes no length, so that a sample which still
            fits no pack raises under them too.
        align: every sample takes a multiple of `align` tokens of its pack.
        keep_unsupervised: keep samples without a supervised token; they cost as much as others and teach nothing.
        drop_last: drop an incomplete last step; False fills it with empty packs.
        cost_model: what a sample costs, for max_cost and for the balance across ranks.

    Raises:
        TypeError, ValueError: naming the field.
    """

    max_tokens: int = 32768
    max_frames: int | None = None
    max_cost: float | str | None = None
    strategy: Literal["in_order", "open_best_fit", "first_fit", "best_fit", "bfd"] = "open_best_fit"
    open_packs: int = 8
    window: int = 4096
    overlong: Literal["error", "drop", "truncate_text", "reduce_frames", "split"] = "error"
    align: int = 1
    keep_unsupervised: bool = False
    drop_last: bool = True
    cost_model: CostModel = field(default_factory=CostModel.internvideo2_5_8b)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_frames", "open_packs", "window", "align"):
            value = getattr(self, name)
            if value is None and name == "max_frames":
                continue
            check_int(name, value, minimum=1)
            if value > _LARGEST:
                raise ValueError(f"{name} must be at most 2^62, got {value}")
        if self.align > self.max_tokens:
            raise ValueError(f"align must be at most max_tokens = {self.max_tokens}, got {self.align}")
        if isinstance(self.max_cost, str):
            self._cost_factor(self.max_cost)
        elif self.max_cost is not None:
            _check_number("max_cost", self.max_cost, minimum=0.0)
            if self.max_cost == 0:
                raise ValueError("max_cost must be above 0, got 0")
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("overlong", self.overlong, _OVERLONG)
        for name in ("keep_unsupervised", "drop_last"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.cost_model, CostModel):
            raise TypeError(f"cost_model must be a CostModel, got {type(self.cost_model).__name__}")

    @classmethod
    def paper(cls) -> PackConfig:
        """32,768 tokens, merged by order (InternVideo2.5 section 3.5)."""
        return cls(strategy="in_order")

    def cost_limit(self, num_tokens: npt.NDArray[np.int64], cost: npt.NDArray[np.float64]) -> float:
        """`max_cost` as a number for these samples, infinite where there is no limit."""
        if self.max_cost is None or num_tokens.size == 0:
            return math.inf
        if not isinstance(self.max_cost, str):
            return float(self.max_cost)
        # Exactly rounded sums: every rank must find the same limit, whatever its vector units do to numpy's sum.
        per_token = math.fsum(cost.tolist()) / sum(num_tokens.tolist())
        return self._cost_factor(self.max_cost) * per_token * self.max_tokens

    @staticmethod
    def _cost_factor(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)x", text)
        if match is None or float(match[1]) == 0:
            raise ValueError(f'max_cost must be a number, None, or a multiple such as "1.05x", got {text!r}')
        return float(match[1])


def _check_number(name: str, value: float, *, minimum: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= minimum):
        raise ValueError(f"{name} must be finite and at least {minimum:g}, got {value}")
