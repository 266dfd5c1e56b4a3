// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of token merging: raw device pointers, sizes, strides in elements and a stream; no framework types.
// Every function enqueues its work and returns; std::invalid_argument names a bad argument before anything is launched,
// std::runtime_error carries CUDA's message.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "lrc/token_rows.h"

namespace lrc {

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
