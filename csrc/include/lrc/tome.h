// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of token merging: raw device pointers, sizes, strides in elements and a stream; no framework types.
// Every function enqueues its work and returns; std::invalid_argument names a bad argument before anything is launched,
// std::runtime_error carries CUDA's message.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "lrc/dtype.h"

namespace lrc {

/// Where tokens lie in memory. Token t concatenates shuffle^2 pieces of `width` channels (pixel shuffle v2). With frame
/// f = t / tokens_per_frame, u = t % tokens_per_frame and (i, j) = (u / grid_width, u % grid_width), piece (di, dj)
/// starts at
///   f * frame_stride + (prefix + (i * shuffle + di) * grid_width * shuffle + j * shuffle + dj) * row_stride.
/// Dense [B, N, D] is shuffle 1 and tokens_per_frame = grid_width = N; packed [T, D] is one such frame.
struct TokenRows {
  int64_t width;
  int64_t shuffle;
  int64_t tokens_per_frame;
  int64_t grid_width;
  int64_t prefix;
  int64_t frame_stride;
  int64_t row_stride;
};

/// metric[t, k] = (1 / num_heads) * sum over h of x[t, h * K + k], in ascending h in fp32, K = token width / num_heads.
/// x as `rows` says, metric fp32 [num_tokens, K].
void head_mean(const void* x, DType dtype, const TokenRows& rows, int64_t num_tokens, int64_t num_heads, float* metric,
               cudaStream_t stream);

/// x[t] = y[assign[t]] * weight[t] / size[assign[t]] in fp32, rounded once; null weight or size count as 1.
/// Where the weight or the size is 0 the token is exactly 0, whatever y holds. Prefix rows become 0.
/// y [*, token width] contiguous, x as `rows` says, of one dtype; assign int32 and weight fp32 [num_tokens].
void gather_rows(const void* y, DType dtype, const int32_t* assign, const float* size, const float* weight,
                 const TokenRows& rows, int64_t num_tokens, void* x, cudaStream_t stream);

}  // namespace lrc
