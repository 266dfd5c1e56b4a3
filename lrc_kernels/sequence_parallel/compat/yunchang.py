# SPDX-License-Identifier: Apache-2.0
"""yunchang's hybrid attention: `set_seq_parallel_pg` once, `EXTRACT_FUNC_DICT` to cut a tensor, `LongContextAttention`
over this rank's rows. Its "strip" cut has no counterpart here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.sequence_parallel.compat.local import attend, refuse
from lrc_kernels.sequence_parallel.mesh import make_mesh


class AttnType(Enum):
    """Accepted in yunchang's place. Which exact kernel runs is up to `lrc_kernels.backend`; the quantised ones (SAGE)
    would give another result and are refused."""

    AITER = "aiter"
    FA = "fa"
    FA3 = "fa3"
    FLASHINFER = "flashinfer"
    NPU = "npu"
    SAGE_AUTO = "sage_auto"
    SAGE_FP16 = "sage_fp16"
    SAGE_FP16_TRITON = "sage_fp16_triton"
    SAGE_FP8 = "sage_fp8"
    SAGE_FP8_SM90 = "sage_fp8_sm90"
    SPARSE_SAGE = "sparse_sage"
    TORCH_CUDNN = "torch_cudnn"
    TORCH_EFFICIENT = "torch_efficient"
    TORCH_FLASH = "torch_flash"
    TORCH_MATH = "torch_math"

    @classmethod
    def from_string(cls, s: str) -> AttnType:
        """The type of that value."""
        return cls(s)


class _Degrees:
    """What `set_seq_parallel_pg` set: yunchang keeps it for the whole process, and so its callers rely on it."""

    ulysses = ring = 0
    placement = "head_first"
    meshes: dict[str, DeviceMesh] = {}  # noqa: RUF012


def set_seq_parallel_pg(
    sp_ulysses_degree: int, sp_ring_degree: int, rank: int, world_size: int, use_ulysses_low: bool = True
) -> None:
    """Choose the degrees of all later calls. `use_ulysses_low`: ulysses ranks are neighbours.

    Raises:
        ValueError: degrees whose product does not divide the world size.
    """
    if world_size % (sp_ulysses_degree * sp_ring_degree):
        raise ValueError(f"sp_ulysses_degree * sp_ring_degree must divide world_size ({world_size}), "
                         f"got {sp_ulysses_degree} * {sp_ring_degree}")  # fmt: skip
    _Degrees.ulysses, _Degrees.ring = sp_ulysses_degree, sp_ring_degree
    _Degrees.placement, _Degrees.meshes = "head_first" if use_ulysses_low else "context_first", {}


def basic_extract_local(value: Tensor, rank: int, world_size: int, *args: Any, **kwargs: Any) -> Tensor:
    """The `rank`-th of `world_size` equal cuts of [B, S, ...]."""
    return value.chunk(world_size, 1)[rank].detach().clone()


def zigzag_extract_local(
    value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int = 1, *args: Any, **kwargs: Any
) -> Tensor:
    """Of 2 rd equal cuts the two of ring rank rank // ud, and of these the part of ulysses rank rank % ud."""
    cuts, (ring_rank, ulysses_rank) = value.chunk(2 * rd, dim), divmod(rank, ud)
    both = torch.cat((cuts[ring_rank], cuts[2 * rd - 1 - ring_rank]), dim)
    return both.chunk(ud, dim)[ulysses_rank].contiguous()


EXTRACT_FUNC_DICT = {"basic": basic_extract_local, "zigzag": zigzag_extract_local}


class _Attention(torch.nn.Module, ABC):
    """Attention for q, k, v [B, S / P, H, K]; subclasses say on which ranks and how their rows were cut."""

    zigzag = False

    def __init__(self, scatter_idx: int, gather_idx: int, attn_type: AttnType):
        super().__init__()
        if (scatter_idx, gather_idx) != (2, 1):
            raise ValueError(f"scatter_idx, gather_idx must be 2, 1, got {scatter_idx}, {gather_idx}")
        if "sage" in attn_type.value:
            raise ValueError(f"attn_type must be an exact one, got {attn_type}")

    @abstractmethod
    def ranks(self, device_type: str) -> tuple[DeviceMesh, tuple[int, int]]:
        """The mesh and its degrees (ring, ulysses)."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, *args: Any,
    ) -> Tensor:  # fmt: skip
        """out like query. As in yunchang it is the only result, whatever `return_attn_probs` says.

        Raises:
            ValueError: dropout, a window, slopes or a cap, or rows that the cuts do not divide.
            RuntimeError: LongContextAttention before `set_seq_parallel_pg`.
        """
        refuse(dropout_p, window_size, alibi_slopes, softcap)
        if args:
            raise ValueError(f"arguments after return_attn_probs must be none, got {len(args)}")
        mesh, (ring, ulysses) = self.ranks(query.device.type)
        # Ulysses ranks share each sequence of the batch, not the batch.
        outs = [
            attend(q, k, v, (q.shape[0] * ring * ulysses,), mesh, (ring, ulysses), zigzag=self.zigzag, causal=causal,
                   softmax_scale=softmax_scale)[0]
            for q, k, v in zip(query, key, value, strict=True)
        ]  # fmt: skip
        return torch.stack(outs)


class LongContextAttention(_Attention):
    """Over ring x ulysses ranks, for rows cut as by `EXTRACT_FUNC_DICT[ring_impl_type]`.

    Raises:
        ValueError: another `ring_impl_type`, axes other than yunchang's own, a quantised `attn_type`, a processor.
    """

    def __init__(self, scatter_idx: int = 2, gather_idx: int = 1, ring_impl_type: str = "basic",
                 use_pack_qkv: bool = False, use_sync: bool = False, attn_type: AttnType = AttnType.FA,
                 attn_processor: Any = None):  # fmt: skip
        super().__init__(scatter_idx, gather_idx, attn_type)
        if ring_impl_type not in EXTRACT_FUNC_DICT:
            raise ValueError(f"ring_impl_type must be one of {', '.join(EXTRACT_FUNC_DICT)}, got {ring_impl_type!r}")
        if attn_processor is not None:
            raise ValueError(f"attn_processor must be None, got {type(attn_processor).__name__}")
        self.zigzag = ring_impl_type == "zigzag"

    def ranks(self, device_type: str) -> tuple[DeviceMesh, tuple[int, int]]:
        if _Degrees.ring == 0:
            raise RuntimeError("set_seq_parallel_pg must be called before LongContextAttention")
        if device_type not in _Degrees.meshes:
            dp = distributed.get_world_size() // (_Degrees.ring * _Degrees.ulysses)
            _Degrees.meshes[device_type] = make_mesh(
                device_type, dp=dp, ring=_Degrees.ring, ulysses=_Degrees.ulysses, placement=_Degrees.placement
            )
        return _Degrees.meshes[device_type], (_Degrees.ring, _Degrees.ulysses)


class UlyssesAttention(_Attention):
    """Over the ranks of a process group (None = all), for rows in equal cuts.

    Raises:
        ValueError: axes other than yunchang's own, or a quantised `attn_type`.
    """

    def __init__(self, sequence_process_group: Any = None, scatter_idx: int = 2, gather_idx: int = 1,
                 use_sync: bool = False, attn_type: AttnType = AttnType.FA):  # fmt: skip
        super().__init__(scatter_idx, gather_idx, attn_type)
        self.group = sequence_process_group
        self.meshes: dict[str, DeviceMesh] = {}

    def ranks(self, device_type: str) -> tuple[DeviceMesh, tuple[int, int]]:
        if device_type not in self.meshes:
            group: Any = distributed.group.WORLD if self.group is None else self.group
            self.meshes[device_type] = DeviceMesh.from_group(group, device_type, mesh_dim_names=("ulysses",))
        return self.meshes[device_type], (1, self.meshes[device_type].size())
