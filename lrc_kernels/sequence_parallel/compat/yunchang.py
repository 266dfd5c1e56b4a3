# SPDX-License-Identifier: Apache-2.0
"""yunchang's hybrid attention: `set_seq_parallel_pg` once, `EXTRACT_FUNC_DICT` to cut a tensor, `LongContextAttention`
over this rank's rows; and the pieces it is made of, ring functions and all-to-alls, as far as they are exact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.checks import check_choice
from lrc_kernels.sequence_parallel.comm import AllToAll, Schedule
from lrc_kernels.sequence_parallel.compat import ring_flash_attn
from lrc_kernels.sequence_parallel.compat.local import attend, refuse
from lrc_kernels.sequence_parallel.mesh import make_mesh, ranks_of


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

    ring, ulysses = 0, 1
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


def _place(rank: int, ring: int, ulysses: int) -> tuple[int, int]:
    """(ring rank, ulysses rank) of a rank of the mesh that `set_seq_parallel_pg` chose."""
    rank %= ring * ulysses
    return divmod(rank, ulysses) if _Degrees.placement == "head_first" else (rank % ring, rank // ring)


def basic_extract_local(value: Tensor, rank: int, world_size: int, *args: Any, **kwargs: Any) -> Tensor:
    """The rows of [B, S, ...] that `rank` of `world_size` holds: equal cuts, in the order of (ring, ulysses) ranks."""
    ring_rank, ulysses_rank = _place(rank, world_size // _Degrees.ulysses, _Degrees.ulysses)
    return value.chunk(world_size, 1)[ring_rank * _Degrees.ulysses + ulysses_rank].detach().clone()


def zigzag_extract_local(
    value: Tensor, rank: int, world_size: int, rd: int, ud: int, dim: int = 1, *args: Any, **kwargs: Any
) -> Tensor:
    """Of 2 rd equal cuts the two of the ring rank, and of these the part of the ulysses rank."""
    cuts, (ring_rank, ulysses_rank) = value.chunk(2 * rd, dim), _place(rank, rd, ud)
    both = torch.cat((cuts[ring_rank], cuts[2 * rd - 1 - ring_rank]), dim)
    return both.chunk(ud, dim)[ulysses_rank].contiguous()


def stripe_extract_local(
    value: Tensor, rank: int, world_size: int, rd: int, ud: int, *args: Any, **kwargs: Any
) -> Tensor:
    """Every rd-th row of [B, S, ...] from the ring rank on, and of these the part of the ulysses rank."""
    ring_rank, ulysses_rank = _place(rank, rd, ud)
    return value[:, ring_rank::rd].chunk(ud, 1)[ulysses_rank].contiguous()


EXTRACT_FUNC_DICT = {
    "basic": basic_extract_local,
    "zigzag": zigzag_extract_local,
    "strip": stripe_extract_local,
    "basic_pytorch": basic_extract_local,
    "basic_flashinfer": basic_extract_local,
    "basic_npu": basic_extract_local,
}
# In the terms of `local.CUTS`; "basic_*" says who computes, which `lrc_kernels.backend` decides.
_CUTS = {name: {"zigzag": "zigzag", "strip": "stripe"}.get(name, "contiguous") for name in EXTRACT_FUNC_DICT}


def dense(
    cut: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, group: Any = None,
    attn_type: AttnType = AttnType.FA, attn_processor: Any = None,
) -> ring_flash_attn.Result:  # fmt: skip
    """q, k, v [B, S / R, H, K] -> out alike, over the ring `group`; with `return_attn_probs` (out, lse [B, H, S / R],
    None).

    Raises:
        ValueError: dropout, a window, slopes or a cap, a quantised `attn_type`, rows that the cuts do not divide.
    """
    _check_kind(attn_type, attn_processor)
    refuse(dropout_p, window_size, alibi_slopes, softcap)
    return ring_flash_attn.dense(cut, q, k, v, 0.0, softmax_scale, causal, return_attn_probs=return_attn_probs,
                                 group=group)  # fmt: skip


def dense_kvpacked(cut: str, q: Tensor, kv: Tensor, *options: Any, **named: Any) -> ring_flash_attn.Result:
    """kv [B, S / R, 2, H, K]."""
    k, v = kv.unbind(2)
    return dense(cut, q, k, v, *options, **named)


def dense_qkvpacked(cut: str, qkv: Tensor, *options: Any, **named: Any) -> ring_flash_attn.Result:
    """qkv [B, S / R, 3, H, K]."""
    q, k, v = qkv.unbind(2)
    return dense(cut, q, k, v, *options, **named)


ring_flash_attn_func = partial(dense, "contiguous")
ring_flash_attn_kvpacked_func = partial(dense_kvpacked, "contiguous")
ring_flash_attn_qkvpacked_func = partial(dense_qkvpacked, "contiguous")
ring_pytorch_attn_func = ring_flashinfer_attn_func = ring_flash_attn_func
stripe_flash_attn_func = partial(dense, "stripe")
stripe_flash_attn_kvpacked_func = partial(dense_kvpacked, "stripe")
stripe_flash_attn_qkvpacked_func = partial(dense_qkvpacked, "stripe")
zigzag_ring_flash_attn_func = partial(dense, "zigzag")
zigzag_ring_flash_attn_kvpacked_func = partial(dense_kvpacked, "zigzag")
zigzag_ring_flash_attn_qkvpacked_func = partial(dense_qkvpacked, "zigzag")
RING_IMPL_DICT = {name: partial(dense, cut) for name, cut in _CUTS.items()}
RING_IMPL_QKVPACKED_DICT = {name: partial(dense_qkvpacked, cut) for name, cut in _CUTS.items()}


def _check_kind(attn_type: AttnType, attn_processor: Any) -> None:
    if "sage" in attn_type.value:
        raise ValueError(f"attn_type must be an exact one, got {attn_type}")
    if attn_processor is not None:
        raise ValueError(f"attn_processor must be None, got {type(attn_processor).__name__}")


class _Attention(torch.nn.Module, ABC):
    """Attention for q, k, v [B, S / P, H, K]; subclasses say on which ranks and how their rows were cut."""

    cut = "contiguous"

    def __init__(self, axes: tuple[int, int], wanted: tuple[int, int], attn_type: AttnType, attn_processor: Any = None):
        super().__init__()
        if axes != wanted:
            raise ValueError(f"scatter_idx, gather_idx must be {wanted[0]}, {wanted[1]}, got {axes[0]}, {axes[1]}")
        _check_kind(attn_type, attn_processor)

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
            attend(q, k, v, (q.shape[0] * ring * ulysses,), mesh, (ring, ulysses), cut=self.cut, causal=causal,
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
        super().__init__((scatter_idx, gather_idx), (2, 1), attn_type, attn_processor)
        check_choice("ring_impl_type", ring_impl_type, tuple(_CUTS))
        self.cut = _CUTS[ring_impl_type]

    def ranks(self, device_type: str) -> tuple[DeviceMesh, tuple[int, int]]:
        if _Degrees.ring == 0:
            raise RuntimeError("set_seq_parallel_pg must be called before LongContextAttention")
        if device_type not in _Degrees.meshes:
            dp = distributed.get_world_size() // (_Degrees.ring * _Degrees.ulysses)
            _Degrees.meshes[device_type] = make_mesh(
                device_type, dp=dp, ring=_Degrees.ring, ulysses=_Degrees.ulysses, placement=_Degrees.placement
            )
        return _Degrees.meshes[device_type], (_Degrees.ring, _Degrees.ulysses)


class AsyncLongContextAttention(LongContextAttention):
    """The same under the name of yunchang's forward-only variant; this one has a backward, and takes any heads."""

    def __init__(self, scatter_idx: int = 2, gather_idx: int = 1, ring_impl_type: str = "basic"):
        super().__init__(scatter_idx, gather_idx, ring_impl_type)


class LongContextAttentionQKVPacked(torch.nn.Module):
    """`LongContextAttention` of one tensor qkv [B, S / P, 3, H, K]."""

    def __init__(self, scatter_idx: int = 3, gather_idx: int = 1, ring_impl_type: str = "basic",
                 use_sync: bool = False, attn_type: AttnType = AttnType.FA):  # fmt: skip
        super().__init__()
        self.attention = LongContextAttention(scatter_idx - 1, gather_idx, ring_impl_type, attn_type=attn_type)

    def forward(self, qkv: Tensor, *options: Any, **named: Any) -> Tensor:
        """out [B, S / P, H, K]; options as `LongContextAttention.forward`."""
        return self.attention(*qkv.unbind(2), *options, **named)


class UlyssesAttention(_Attention):
    """Over the ranks of a process group (None = all), for rows in equal cuts.

    Raises:
        ValueError: axes other than yunchang's own, or a quantised `attn_type`.
    """

    def __init__(self, sequence_process_group: Any = None, scatter_idx: int = 2, gather_idx: int = 1,
                 use_sync: bool = False, attn_type: AttnType = AttnType.FA):  # fmt: skip
        super().__init__((scatter_idx, gather_idx), (2, 1), attn_type)
        self.group = sequence_process_group

    def ranks(self, device_type: str) -> tuple[DeviceMesh, tuple[int, int]]:
        mesh = _ulysses_mesh(self.group, device_type)
        return mesh, (1, mesh.size())


class _SeqAllToAll(torch.autograd.Function):
    """Split dimension `scatter_idx` among the ranks of a group, put what arrives together along `gather_idx`."""

    @staticmethod
    def forward(ctx: Any, group: Any, x: Tensor, scatter_idx: int, gather_idx: int, use_sync: bool = False) -> Tensor:
        ctx.options = group, gather_idx, scatter_idx, use_sync
        mesh = _ulysses_mesh(group, x.device.type)
        if x.shape[scatter_idx] % mesh.size():
            raise ValueError(f"dimension scatter_idx ({scatter_idx}) must be divisible by {mesh.size()} ranks, "
                             f"got shape {list(x.shape)}")  # fmt: skip
        return ranks_of(mesh).run("SeqAllToAll", _exchange(x, scatter_idx, gather_idx, mesh.size()))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        group, *options = ctx.options
        return None, _SeqAllToAll.apply(group, grads[0], *options), None, None, None


class SeqAllToAll4D(_SeqAllToAll):
    """`apply(group, x, 2, 1)`: [B, S / P, H, K] -> [B, S, H / P, K]; `apply(group, x, 1, 2)` back."""


class SeqAllToAll5D(_SeqAllToAll):
    """`apply(group, x, 3, 1)`: [B, S / P, 3, H, K] -> [B, S, 3, H / P, K]; `apply(group, x, 1, 3)` back."""


def _exchange(x: Tensor, scatter_idx: int, gather_idx: int, size: int) -> Schedule[Tensor]:
    if size == 1:
        return x.clone()
    parts = torch.stack(x.chunk(size, scatter_idx))
    arriving = yield AllToAll("ulysses", parts, [1] * size, [1] * size, 0)
    return torch.cat((yield arriving).unbind(0), gather_idx)


@lru_cache(maxsize=8)
def _mesh_of(group: Any, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("ulysses",))


def _ulysses_mesh(group: Any, device_type: str) -> DeviceMesh:
    return _mesh_of(distributed.group.WORLD if group is None else group, device_type)
