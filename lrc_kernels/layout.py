# SPDX-License-Identifier: Apache-2.0
"""VarlenLayout: how the rows of S sequences lie back to back in a packed tensor, decided on the host once per batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ON_DEVICE = "on device"


class VarlenLayout:
    """The lengths of packed sequences, on the host and as `cu_seqlens` on the device. Immutable.

    Inside a model nothing synchronises: kernels read `cu_seqlens`, launches read the Python ints.

    Args:
        lengths: rows of each sequence, >= 0, their sum below 2^31.
        device: where `cu_seqlens` lives (default: CPU).

    Attributes:
        cu_seqlens: int32 [S + 1], the first row of each sequence and the end.

    Raises:
        TypeError: lengths that are no integers. ValueError: a negative length, or a sum past int32.
    """

    cu_seqlens: Tensor

    def __init__(self, lengths: Sequence[int], device: torch.device | str | None = None):
        checked = _check_lengths(lengths)
        cu_seqlens = torch.tensor((0, *accumulate(checked)), dtype=torch.int32)
        if device is not None:
            cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        self._fill(cu_seqlens, max(checked, default=0), sum(checked), checked)

    @classmethod
    def uniform(cls, num_sequences: int, length: int, device: torch.device | str | None = None) -> VarlenLayout:
        """`num_sequences` sequences of `length` rows each, without a host list: safe to call in a compiled graph."""
        if num_sequences < 0 or length < 0 or num_sequences * length >= 2**31:
            raise ValueError(
                f"num_sequences and length must be >= 0 and their product below 2^31, got {num_sequences} and {length}"
            )
        layout = cls.__new__(cls)
        starts = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
        layout._fill(starts, length, num_sequences * length, None)
        return layout

    @classmethod
    def on_device(cls, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> VarlenLayout:
        """A layout whose lengths only the device knows (a random selection): reading `lengths` raises ValueError.

        Args:
            cu_seqlens: int32 [S + 1], ending at `num_tokens`.
            max_seqlen: an upper bound on the rows of the longest sequence; launches use it.
            num_tokens: rows of all sequences together.
        """
        layout = cls.__new__(cls)
        layout._fill(cu_seqlens.contiguous(), max_seqlen, num_tokens, ON_DEVICE)
        return layout

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> VarlenLayout:
        """A layout from int32 or int64 [S + 1] offsets; a device tensor costs one synchronisation.

        Raises:
            TypeError, ValueError: wrong dtype or shape, an offset that does not start at 0 or decreases.
        """
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            seen = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {seen}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {offsets[0]}")
        lengths = [end - start for start, end in pairwise(offsets)]
        if lengths and min(lengths) < 0:
            at = lengths.index(min(lengths))
            raise ValueError(
                f"cu_seqlens must not decrease, got {offsets[at]} then {offsets[at + 1]} at index {at + 1}"
            )
        return cls(lengths, device=cu_seqlens.device)

    def _fill(
        self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int, lengths: tuple[int, ...] | str | None
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self._lengths = lengths
        self._sizes: Tensor | tuple[int, int] = (max_seqlen, num_tokens)
        if not torch.compiler.is_compiling():
            # torch.compile turns an int attribute dynamic only after it has changed once, but a tensor size that is
            # marked as such at once: kept as the sizes of an empty tensor, these ints never cost a further compile.
            self._sizes = torch.empty(max_seqlen, num_tokens, 0)
            torch._dynamo.maybe_mark_dynamic(self.cu_seqlens, 0)
            torch._dynamo.maybe_mark_dynamic(self._sizes, [0, 1])

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence."""
        return self._sizes.shape[0] if isinstance(self._sizes, Tensor) else self._sizes[0]

    @property
    def num_tokens(self) -> int:
        """Rows of all sequences together."""
        return self._sizes.shape[1] if isinstance(self._sizes, Tensor) else self._sizes[1]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence, on the host; ValueError where only the device knows them."""
        if isinstance(self._lengths, str):
            raise ValueError("lengths must be known on the host, got one that the device decided")
        if self._lengths is None:
            return (self.max_seqlen,) * self.num_sequences
        return self._lengths

    @property
    def is_on_host(self) -> bool:
        """True where the host knows `lengths`."""
        return self._lengths != ON_DEVICE

    @property
    def is_uniform(self) -> bool:
        """True where every sequence has `max_seqlen` rows."""
        return self._lengths != ON_DEVICE and self.max_seqlen * self.num_sequences == self.num_tokens

    def to(self, device: torch.device | str) -> VarlenLayout:
        """The same layout with `cu_seqlens` on `device`."""
        layout = type(self).__new__(type(self))
        # What comes back to the host must be there when it is read.
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=torch.device(device).type != "cpu")
        layout._fill(cu_seqlens, self.max_seqlen, self.num_tokens, self._lengths)
        return layout

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, VarlenLayout):
            return self is other
        return ON_DEVICE not in (self._lengths, other._lengths) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash((self.num_sequences, self.num_tokens, self.max_seqlen))

    def __repr__(self) -> str:
        if isinstance(self._lengths, str):
            return f"VarlenLayout(lengths on device, max_seqlen<={self.max_seqlen}, num_tokens={self.num_tokens})"
        shown = list(self.lengths[:8]) + ["..."] * (self.num_sequences > 8)
        return f"VarlenLayout({shown}, num_tokens={self.num_tokens}, device={self.cu_seqlens.device})"


def as_layout(cu_seqlens: VarlenLayout | Tensor) -> VarlenLayout:
    """A VarlenLayout from what a `cu_seqlens` argument accepts (a device tensor costs one synchronisation)."""
    return cu_seqlens if isinstance(cu_seqlens, VarlenLayout) else VarlenLayout.from_cu_seqlens(cu_seqlens)


def _check_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    if isinstance(lengths, (str, bytes, Tensor)) or not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be a sequence of ints on the host, got {type(lengths).__name__}")
    checked = []
    for index, length in enumerate(lengths):
        if isinstance(length, bool) or not hasattr(length, "__index__"):
            raise TypeError(f"lengths[{index}] must be an int, got {type(length).__name__}")
        if int(length) < 0:
            raise ValueError(f"lengths[{index}] must be >= 0, got {length}")
        checked.append(int(length))
    if sum(checked) >= 2**31:
        raise ValueError(f"lengths must sum to less than 2^31 rows, got {sum(checked)}")
    return tuple(checked)


def _flatten(layout: VarlenLayout) -> tuple[list[Any], Any]:
    return [layout.cu_seqlens], (layout.max_seqlen, layout.num_tokens, layout._lengths)


def _unflatten(children: Iterable[Any], context: Any) -> VarlenLayout:
    layout = VarlenLayout.__new__(VarlenLayout)
    (cu_seqlens,) = children
    layout._fill(cu_seqlens, *context)
    return layout


pytree.register_pytree_node(VarlenLayout, _flatten, _unflatten, serialized_type_name="lrc_kernels.VarlenLayout")


def register_pytree(cls: type, leaves: int) -> None:
    """Make a frozen dataclass a pytree: its first `leaves` fields are tensors or pytrees, the others are constants."""
    names = [field.name for field in dataclasses.fields(cls)]

    def flatten(value: Any) -> tuple[list[Any], Any]:
        return [getattr(value, name) for name in names[:leaves]], tuple(getattr(value, name) for name in names[leaves:])

    pytree.register_pytree_node(
        cls,
        flatten,
        lambda children, context: cls(*children, *context),
        serialized_type_name=f"{cls.__module__.rpartition('.')[0]}.{cls.__name__}",
    )
