# SPDX-License-Identifier: Apache-2.0
"""ToMe for Stable Diffusion in diffusers: tokens merge before self-attention and part again after it, with one
destination in each window of the image (Bolya and Hoffman 2023), and plans that serve several denoising steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lrc_kernels.checks import check_int
from lrc_kernels.integrations.patch import Patch
from lrc_kernels.tome import MergePlan, head_mean, merge_tokens, unmerge_tokens
from lrc_kernels.tome.compat import match_tokens
from lrc_kernels.tome.plan import uniform_budget


@dataclass
class Session:
    """What the blocks of one patched UNet share: the options, and where the denoising stands.

    Nothing that a block reads changes from step to step but whether it has a plan, or torch.compile would compile it
    anew in each.

    Attributes:
        pipe: what was patched, whose scheduler says when a run begins.
        slots: those of the blocks.
        grid: rows and columns of the latent of the current step, None before the first.
        age: forwards of the UNet since the blocks last forgot their plans.
        timesteps, timestep: the scheduler's table and the entry of the last step, read where plans outlive a step.
        has_merged: whether a block ever has, and has_ended whether a forward has.
        hooks: `begin` and `end` on the UNet.
    """

    pipe: Any
    ratio: float
    sx: int
    sy: int
    max_downsample: int
    reuse_steps: int
    random: bool
    generator: torch.Generator
    grid: tuple[int, int] | None = None
    slots: list[Slot] = field(default_factory=list, repr=False)
    age: int = 0
    timesteps: Any = None
    timestep: float | None = None
    has_merged: bool = False
    has_ended: bool = False
    hooks: list[RemovableHandle] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)) or not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be a number with 0 <= ratio < 1, got {self.ratio!r}")
        for name in ("sx", "sy", "max_downsample", "reuse_steps"):
            check_int(name, getattr(self, name), minimum=1)
        if not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(self.generator).__name__}")

    def attach(self, unet: nn.Module) -> None:
        self.hooks.append(unet.register_forward_pre_hook(self.begin, with_kwargs=True))
        self.hooks.append(unet.register_forward_hook(self.end))

    def detach(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()

    def forget(self) -> None:
        """Let no plan of the steps so far serve another."""
        self.age = 0
        for slot in self.slots:
            slot.made = None

    @torch.compiler.disable
    def begin(self, unet: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A forward pre-hook of the UNet: reads the size of the latent [B, C, H, W], and whether plans have served."""
        sample = arguments[0] if arguments else options.get("sample")
        if not isinstance(sample, Tensor) or sample.dim() != 4:
            seen = list(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ValueError(f"the UNet's sample must be a latent [B, C, H, W], got {seen}")
        self.grid = (sample.shape[2], sample.shape[3])
        timestep = arguments[1] if len(arguments) > 1 else options.get("timestep")
        if self.reuse_steps == 1 or self._begins_run(timestep) or self.age >= self.reuse_steps:
            self.forget()
        self.age += 1

    def _begins_run(self, timestep: Any) -> bool:
        """Whether a run begins: its timesteps are set, or go up after they went down."""
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        now = float(timestep.max()) if isinstance(timestep, Tensor) else timestep
        rises = now is not None and self.timestep is not None and now > self.timestep
        begins = rises or timesteps is not self.timesteps
        self.timesteps, self.timestep = timesteps, now
        return begins

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the UNet is of no pipeline, and must not bring one along.
        return {**self.__dict__, "pipe": None, "timesteps": None}

    @torch.compiler.disable
    def end(self, unet: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """A forward hook of the UNet: says once that nothing merges, which costs quality nothing and saves nothing."""
        said, self.has_ended = self.has_ended, True
        if not said and not self.has_merged and self.ratio > 0:
            warnings.warn(
                f"no block merged: none has self-attention at a downsampling <= max_downsample = {self.max_downsample} "
                "with windows to merge (SDXL needs max_downsample=2)",
                stacklevel=2,
            )


@dataclass
class Slot:
    """One block's place in a session: the plan of its self-attention while it runs, and the last plan that it made.

    Attributes:
        forwards: what the classes of the block and of its self-attention define, as functions: torch.compile traces no
            attribute of a class that it was told to leave alone, as diffusers tells it of these.
    """

    session: Session
    forwards: tuple[Callable[..., Any], Callable[..., Any]]
    running: MergePlan | None = None
    made: MergePlan | None = None
    made_for: tuple[Any, ...] = field(default_factory=tuple)


class TomePatch(Patch):
    """A patched UNet. `undo()` restores it; `reset()` says that another image begins."""

    def __init__(self, model: Any, session: Session) -> None:
        super().__init__(model)
        self._session = session

    def reset(self) -> None:
        """Let no plan of the steps so far serve another, where `reuse_steps` would."""
        self._session.forget()


def apply_tome_to_diffusers(
    pipe: Any,
    ratio: float = 0.5,
    *,
    sx: int = 2,
    sy: int = 2,
    max_downsample: int = 1,
    reuse_steps: int = 1,
    random: bool = True,
    generator: torch.Generator | None = None,
) -> TomePatch:
    """Merge a share of the tokens around every self-attention of a diffusers UNet, without training it.

    >>> patch = apply_tome_to_diffusers(pipe, ratio=0.5, generator=torch.Generator().manual_seed(0))
    >>> image = pipe("a cat").images[0]
    >>> patch.undo()

    In every sy x sx window of the image one token is a destination, the others are sources; the most similar sources
    merge into their destinations, attention runs on what is left, and every token gets its row back. Destinations are
    drawn anew for each plan and shared by the batch, so that a prompt and its unconditional pair merge alike.
    One image is denoised at a time: the plans live in the patch. Applying it again replaces what the first call did.

    Args:
        pipe: a pipeline with a `unet`, or the UNet; its blocks are diffusers' `BasicTransformerBlock`.
        ratio: share of the tokens to merge, 0 <= ratio < 1; at most those that are no destinations (3/4 for 2 x 2).
        sx, sy: columns and rows of a window. Rows and columns that fill no window hold sources only.
        max_downsample: blocks at a coarser resolution than latent / max_downsample are left alone. SDXL has none at 1.
        reuse_steps: forwards of the UNet that a plan serves, within one run. A run begins where the scheduler of `pipe`
            sets its timesteps, as every call of a pipeline does, or where the UNet sees a larger timestep than before,
            which it reads once a step. Where neither says so (a UNet alone, run for one step), call `reset()`.
        random: False takes the top left token of each window, as does a batch of odd size (a prompt without its pair).
            Then torch.compile takes the UNet in one graph for all steps; it breaks where destinations are drawn.
        generator: of the destinations; None = a new one on the CPU with seed 0. Its device may differ from the model's.

    Returns:
        A `TomePatch` with `.model`, `.undo()` and `.reset()`.

    Raises:
        TypeError: a pipe without a UNet, a generator of another type. ValueError: options out of range, a UNet without
        such blocks, a forward that something else replaced. When it runs, ValueError: a mask on self-attention, tokens
        that are no image of the latent's shape.
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    session = Session(pipe, ratio, sx, sy, max_downsample, reuse_steps, random, generator)
    unet, blocks = _find_blocks(pipe)
    first_arguments = [getattr(block.__dict__.get("forward"), "args", ())[:1] for block in blocks]
    earlier = [first[0].session for first in first_arguments if first and isinstance(first[0], Slot)]
    replacements: list[tuple[nn.Module, Any, Slot]] = []
    for block in blocks:
        attention = cast(nn.Module, block.attn1)
        session.slots.append(slot := Slot(session, (type(block).forward, type(attention).forward)))
        replacements += [(block, merging_block, slot), (attention, merging_attention, slot)]
    patch = TomePatch(pipe, session)
    patch.replace_forwards(replacements)
    for replaced in earlier:
        replaced.detach()
    session.attach(unet)
    patch.at_undo(session.detach)
    return patch


def merging_block(slot: Slot, block: nn.Module, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
    """The forward of a patched block: tokens match by what enters the block, and its self-attention merges them."""
    slot.running = _plan(slot, hidden_states)
    try:
        return slot.forwards[0](block, hidden_states, *arguments, **options)
    finally:
        slot.running = None


def merging_attention(slot: Slot, attention: nn.Module, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
    """The forward of a patched block's self-attention on [B, N, C]: merge, attend, give every token its row back."""
    plan = slot.running
    if plan is None:
        return slot.forwards[1](attention, hidden_states, *arguments, **options)
    if options.get("attention_mask") is not None:
        raise ValueError("the attention mask of self-attention must be None where tokens merge, got a mask")
    slot.session.has_merged = True
    merged = merge_tokens(hidden_states, plan)
    return unmerge_tokens(slot.forwards[1](attention, merged, *arguments, **options), plan)


def window_destinations(
    grid: tuple[int, int], *, sx: int = 2, sy: int = 2, generator: torch.Generator | None = None
) -> Tensor:
    """One destination in every sy x sx window of a grid of tokens: bool [rows * columns] on the generator's device.

    Without a generator it is the window's top left token. What fills no window holds none.
    """
    rows, columns = grid
    device = "cpu" if generator is None else generator.device
    windows = (rows // sy, columns // sx)
    if generator is None:
        inside = torch.zeros(windows, dtype=torch.long)
    else:
        inside = torch.randint(sx * sy, windows, generator=generator, device=device)
    row = torch.arange(windows[0], device=device)[:, None] * sy + inside // sx
    column = torch.arange(windows[1], device=device)[None, :] * sx + inside % sx
    destination = torch.zeros(rows * columns, dtype=torch.bool, device=device)
    destination[(row * columns + column).flatten()] = True
    return destination


def _plan(slot: Slot, hidden_states: Tensor) -> MergePlan | None:
    """The plan of this step for a block's tokens [B, N, C], None where they do not merge."""
    session = slot.session
    if session.grid is None:
        raise ValueError("a patched block must run inside of its UNet, which says how large the latent is")
    batch, length, _ = hidden_states.shape
    height, width = session.grid
    downsample = math.ceil(math.sqrt(height * width // length))
    if downsample > session.max_downsample:
        return None
    grid = (math.ceil(height / downsample), math.ceil(width / downsample))
    if grid[0] * grid[1] != length:
        raise ValueError(f"a block must see the {grid[0]} x {grid[1]} tokens of its latent, got {length}")
    num_destinations = (grid[0] // session.sy) * (grid[1] // session.sx)
    r = min(int(length * session.ratio), length - num_destinations)
    if r == 0 or num_destinations == 0:
        return None
    shape = (batch, *grid, hidden_states.device)
    if slot.made is None or slot.made_for != shape:
        draws = session.random and batch % 2 == 0
        destination = window_destinations(
            grid, sx=session.sx, sy=session.sy, generator=session.generator if draws else None
        )
        slot.made = match_tokens(
            head_mean(hidden_states.detach(), 1),
            uniform_budget(batch, length, (r,), hidden_states.device),
            destination=destination.to(hidden_states.device).repeat(batch),
        )
        slot.made_for = shape
    return slot.made


def _find_blocks(pipe: Any) -> tuple[nn.Module, list[nn.Module]]:
    """(the UNet, its blocks)."""
    unet = getattr(pipe, "unet", pipe)
    if not isinstance(unet, nn.Module):
        raise TypeError(f"pipe must be a torch.nn.Module or have a unet, got {type(pipe).__name__}")
    blocks = [module for module in unet.modules() if _is_transformer_block(module)]
    if not blocks:
        raise ValueError(f"the UNet must have a BasicTransformerBlock, got {type(unet).__name__} without one")
    return unet, blocks


def _is_transformer_block(module: nn.Module) -> bool:
    # By name, so that a pipeline of any version, and one with subclassed blocks, needs no import of diffusers.
    named = any(cls.__name__ == "BasicTransformerBlock" for cls in type(module).__mro__)
    return named and isinstance(getattr(module, "attn1", None), nn.Module)
