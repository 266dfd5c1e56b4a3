// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of attention: raw device pointers, sizes, strides in elements and a stream; no framework types.
// Every function enqueues its work and returns; std::invalid_argument names a bad argument before anything is launched,
// std::runtime_error carries CUDA's message.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "lrc/token_rows.h"

namespace lrc {

/// Attention over one set of keys: row t, head h of out starts at t * row_stride + h * head_stride, its channels lie
/// next to each other; lse fp32 at h * lse_head_stride + t * lse_row_stride.
struct PartialAttention {
  const void* out;
  DType dtype;
  int64_t row_stride;
  int64_t head_stride;
  const float* lse;
  int64_t lse_head_stride;
  int64_t lse_row_stride;
};

/// Attention over two disjoint sets of keys from that over each, in fp32. With m = max(lse), a and b = exp(lse - m):
///   merged = (a first.out + b second.out) / (a + b),   merged_lse = m + log(a + b).
/// A row whose lse is -inf or +inf has no key: weight 0, its out is not read. A NaN lse counts as no key beside a
/// finite one, and else makes the row NaN. Without a key on either side: 0 and -inf. merged fp32 [num_rows, num_heads,
/// num_channels] and merged_lse fp32 [num_heads, num_rows], contiguous.
void merge_partials(const PartialAttention& first, const PartialAttention& second, int64_t num_rows, int64_t num_heads,
                    int64_t num_channels, float* merged, float* merged_lse, cudaStream_t stream);

}  // namespace lrc
