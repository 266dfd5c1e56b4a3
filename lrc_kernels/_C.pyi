# SPDX-License-Identifier: Apache-2.0
"""The native module: addresses of tensors in (`Tensor.data_ptr()`), nothing out. csrc/cpu/*.h say what each is."""

TokenRows = tuple[int, ...] | list[int]

has_cuda: bool

def cpu_isa() -> str: ...
def cpu_isas() -> list[str]: ...
def set_cpu_isa(name: str) -> None: ...
def tome_head_mean(
    x: int, dtype: int, rows: TokenRows, num_tokens: int, num_heads: int, metric: int, threads: int = 1
) -> None: ...
def tome_plan(
    metric: int,
    inputs: tuple[int, ...],
    num_out: int,
    threshold: float | None,
    position_order: bool,
    round_to_bf16: bool,
    isolate: bool,
    outputs: tuple[int, ...],
    threads: int = 1,
) -> None: ...
def tome_compress(
    x: int,
    dtype: int,
    rows: TokenRows,
    num_heads: int,
    inputs: tuple[int, ...],
    num_out: int,
    round_to_bf16: bool,
    outputs: tuple[int, ...],
    y: int,
    threads: int = 1,
) -> None: ...
def tome_merge(
    x: int,
    dtype: int,
    rows: TokenRows,
    num_tokens: int,
    assign: int,
    size: int,
    weight: int,
    reduction: int,
    num_out: int,
    y: int,
    threads: int = 1,
) -> None: ...
def tome_max_backward(
    grad: int,
    x: int,
    dtype: int,
    rows: TokenRows,
    num_tokens: int,
    y: int,
    assign: int,
    weight: int,
    num_out: int,
    dx: int,
    dx_rows: TokenRows,
    threads: int = 1,
) -> None: ...
def tome_gather(
    y: int,
    dtype: int,
    num_rows: int,
    assign: int,
    size: int,
    weight: int,
    rows: TokenRows,
    num_tokens: int,
    x: int,
    threads: int = 1,
) -> None: ...
def select_tokens(
    mode: int,
    droppable: int,
    cu_seqlens_in: int,
    cu_seqlens_out: int,
    keep: int,
    scores: int,
    seed: int,
    layer: int,
    sequence_ids: int,
    positions: int,
    num_sequences: int,
    indices: int,
    inverse: int,
    threads: int = 1,
) -> None: ...
def select_tokens_bernoulli(
    droppable: int,
    cu_seqlens: int,
    seed: int,
    layer: int,
    sequence_ids: int,
    positions: int,
    num_sequences: int,
    capacity: int,
    threshold: int,
    indices: int,
    inverse: int,
    cu_seqlens_out: int,
    num_wanted: int,
    threads: int = 1,
) -> None: ...
def attention_scores(
    q: int,
    num_rows: int,
    num_heads: int,
    k: int,
    dtype: int,
    num_kv_heads: int,
    head_dim: int,
    strides: tuple[int, ...],
    block_table: int,
    sizes: tuple[int, ...],
    cu_seqlens: int,
    num_sequences: int,
    row_sequence: int,
    row_position: int,
    lse: int,
    max_over_heads: bool,
    head_scale: float,
    softmax_scale: float,
    scores: int,
    num_scores: int,
    threads: int = 1,
    statistics: int = 0,
    factor: int = 0,
) -> None: ...
def attention_score_factors(
    maximum: int, sum: int, seen: int, num_sequences: int, num_heads: int, num_blocks: int, factor: int
) -> None: ...
def pack_samples(
    num_tokens: int,
    num_frames: int,
    cost: int,
    keep: int,
    num_samples: int,
    num_kept: int,
    seed: int,
    epoch: int,
    strategy: int,
    max_tokens: int,
    max_frames: int,
    max_cost: float,
    open_packs: int,
    window: int,
    sample_index: int,
    pack_ptr: int,
    pack_tokens: int,
    pack_frames: int,
    pack_cost: int,
) -> int: ...
def pack_permutation(n: int, seed: int, epoch: int, stream: int, permutation: int) -> None: ...
def cuda_device_status() -> str | None: ...
def cuda_ptx_version() -> int: ...
def cuda_tome_head_mean(
    x: int, dtype: int, rows: TokenRows, num_tokens: int, num_heads: int, metric: int, stream: int
) -> None: ...
def cuda_tome_plan_workspace_bytes(num_tokens: int, num_channels: int) -> int: ...
def cuda_tome_plan(
    metric: int,
    num_tokens: int,
    num_channels: int,
    cu_seqlens_in: int,
    cu_seqlens_out: int,
    num_segments: int,
    max_seqlen: int,
    r: int,
    num_iterations: int,
    size: int,
    is_protected: int,
    destination: int,
    threshold: float | None,
    bf16: bool,
    position_order: bool,
    isolate: bool,
    team: int,
    workspace: int,
    workspace_bytes: int,
    assign: int,
    weight: int,
    size_out: int,
    anchor: int,
    valid: int,
    stream: int,
) -> None: ...
def cuda_tome_merge(
    x: int,
    dtype: int,
    rows: TokenRows,
    num_tokens: int,
    assign: int,
    size: int,
    weight: int,
    cu_seqlens_in: int,
    cu_seqlens_out: int,
    num_segments: int,
    num_out: int,
    reduction: int,
    y: int,
    stream: int,
) -> None: ...
def cuda_tome_gather(
    y: int,
    dtype: int,
    assign: int,
    size: int,
    weight: int,
    rows: TokenRows,
    num_tokens: int,
    x: int,
    stream: int,
) -> None: ...
def cuda_attention_merge_partials(
    first: tuple[int, ...],
    second: tuple[int, ...],
    num_rows: int,
    num_heads: int,
    num_channels: int,
    merged: int,
    merged_lse: int,
    stream: int,
) -> None: ...
def cuda_move_rows(moves: list[tuple[int, ...]], index: int, num_rows: int, stream: int) -> None: ...
def cuda_drop_tokens_rmsnorm(
    residual: int,
    dtype: int,
    row_stride: int,
    weight: int,
    eps: float,
    indices: int,
    num_rows: int,
    width: int,
    dropped: int,
    normed: int,
    rstd: int,
    stream: int,
) -> None: ...
def cuda_select_tokens(
    mode: int,
    droppable: int,
    cu_seqlens_in: int,
    cu_seqlens_out: int,
    keep: int,
    scores: int,
    seed: int,
    layer: int,
    sequence_ids: int,
    positions: int,
    positions_are_64_bit: bool,
    num_sequences: int,
    max_seqlen: int,
    indices: int,
    inverse: int,
    stream: int,
) -> None: ...
