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
/// first_token: what `first_tokens` wrote, then each element of y goes to the token named there and no other; or null.
void gather_rows(const void* y, DType dtype, const int32_t* assign, const float* size, const float* weight,
                 const uint32_t* first_token, const TokenRows& rows, int64_t num_tokens, void* x, cudaStream_t stream);

/// first_token[j, d] = the first t with assign[t] = j, weight[t] != 0 (null: any) and x[t, d] = y[j, d], NaN being NaN;
/// 2^32 - 1 where there is none. With y the maximum of merge_rows it says which token the gradient goes to.
/// x as `rows` says and y [num_out, token width] contiguous, of one dtype; first_token [num_out, token width].
void first_tokens(const void* x, DType dtype, const TokenRows& rows, int64_t num_tokens, const void* y, int64_t num_out,
                  const int32_t* assign, const float* weight, uint32_t* first_token, cudaStream_t stream);

/// Bipartite soft matching of packed segments, all iterations of all segments in one launch; see lrc_kernels.tome.
struct PlanArgs {
  /// fp32 [num_tokens, num_channels], contiguous.
  const float* metric;
  int64_t num_tokens;
  int64_t num_channels;
  /// int32 [num_segments + 1]: first token and first output row of each segment.
  const int32_t* cu_seqlens_in;
  const int32_t* cu_seqlens_out;
  int64_t num_segments;
  /// An upper bound of a segment's tokens.
  int64_t max_seqlen;
  /// int32 [num_iterations, num_segments]: tokens to merge.
  const int32_t* r;
  int64_t num_iterations;
  /// [num_tokens] or null: weights (ones), flags of protected tokens (none), flags of set B (the odd tokens).
  const float* size;
  const uint8_t* is_protected;
  const uint8_t* destination;
  bool has_threshold;
  float threshold;
  /// Round metric, norms and scores to bf16, instead of deciding as fp32 does.
  bool bf16;
  /// Rows in ascending order of their anchors.
  bool position_order;
  /// Zero and non-finite tokens have similarity -inf, and weight 0 if they have to merge.
  bool isolate;
  /// Blocks that share a segment: 1, or on sm_90 up to 8. The result does not depend on it.
  int64_t team;
  /// plan_workspace_bytes(num_tokens, num_channels) bytes, a multiple of 256 the address.
  void* workspace;
  int64_t workspace_bytes;
  /// [num_tokens]: packed output row and weight. [num_out]: total weight, segment-local anchor, whether the row is
  /// real.
  int32_t* assign;
  float* weight;
  float* size_out;
  int32_t* anchor;
  uint8_t* valid;
};

/// Tokens of a segment up to which plan_merge goes.
constexpr int64_t kMaxPlanTokens = 65536;

int64_t plan_workspace_bytes(int64_t num_tokens, int64_t num_channels);

void plan_merge(const PlanArgs& args, cudaStream_t stream);

/// y[j] = sum, sum / size[j] or maximum over the tokens with assign[i] = j, of weight[i] * x[i] (the maximum of x[i]
/// alone), in fp32 in ascending order of i, rounded once. Tokens of weight 0 are left out, whatever they hold; a row
/// without weight is 0.
struct MergeArgs {
  const void* x;
  DType dtype;
  TokenRows rows;
  int64_t num_tokens;
  /// int32 [num_tokens], packed output rows; within a segment those of its rows.
  const int32_t* assign;
  /// fp32 [num_out], and fp32 [num_tokens] or null (ones).
  const float* size;
  const float* weight;
  /// int32 [num_segments + 1]: first token and first output row of each segment.
  const int32_t* cu_seqlens_in;
  const int32_t* cu_seqlens_out;
  int64_t num_segments;
  int64_t num_out;
  Reduction reduction;
  /// Of x's dtype, [num_out, token width], contiguous.
  void* y;
};

void merge_rows(const MergeArgs& args, cudaStream_t stream);

}  // namespace lrc
