// SPDX-License-Identifier: Apache-2.0
// CUDA kernels of token dropout: raw device pointers, sizes, strides and a stream; no framework types. Every function
// enqueues its work and returns; std::invalid_argument names a bad argument before anything is launched,
// std::runtime_error carries CUDA's message.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "lrc/token_rows.h"

namespace lrc {

/// One tensor whose rows move: source [outer, *, row_bytes] with strides in bytes, target [outer, num_rows, row_bytes]
/// contiguous. `fill` is the element that fills rows of index -1, repeated over 8 bytes.
struct RowMove {
  const void* source;
  void* target;
  int64_t outer;
  int64_t row_bytes;
  int64_t source_outer_stride;
  int64_t source_row_stride;
  uint64_t fill;
};

constexpr int kMaxRowMoves = 8;

/// target[o, i] = source[o, index[i]] for every one of `count` <= 8 tensors, in one launch; index int32 [num_rows].
void move_rows(const RowMove* moves, int64_t count, const int32_t* index, int64_t num_rows, cudaStream_t stream);

/// h = residual[indices] -> dropped, weight * round(h * rstd) -> normed, rstd = 1 / sqrt(mean(h^2) + eps), all sums in
/// fp32. residual has rows of `width` elements, row_stride elements apart; weight [width], dropped and normed
/// [num_rows, width] are of its dtype; indices int32 and rstd fp32 [num_rows]. Rows of index -1 are 0.
void drop_tokens_rmsnorm(const void* residual, DType dtype, int64_t row_stride, const void* weight, float eps,
                         const int32_t* indices, int64_t num_rows, int64_t width, void* dropped, void* normed,
                         float* rstd, cudaStream_t stream);

enum class SelectMode : int { kTopk = 0, kLinspace = 1, kRandom = 2 };

/// What select_tokens reads and writes. T rows of num_sequences sequences; null means absent.
struct SelectArgs {
  SelectMode mode;
  const uint8_t* droppable;       // [T]
  const int32_t* cu_seqlens_in;   // [num_sequences + 1]
  const int32_t* cu_seqlens_out;  // [num_sequences + 1]
  const int32_t* keep;            // [num_sequences]
  const float* scores;            // [T], kTopk only
  const int64_t* seed;            // one value, kRandom only, as are the next three
  uint32_t layer;
  const int64_t* sequence_ids;  // [num_sequences], default 0 .. num_sequences - 1
  const void* positions;        // [T], default the row in its sequence
  bool positions_are_64_bit;
  int64_t num_sequences;
  int64_t max_seqlen;  // rows of the longest sequence, below 2^21
  int32_t* indices;    // [T_keep], holding -1 before the call
  int32_t* inverse;    // [T]
};

/// Sequence s keeps keep[s] of its droppable tokens and all others: those of the largest scores (NaN last), of the
/// smallest Philox words, both with ties to the lowest row, or of the ranks i * (n - 1) / (k - 1).
void select_tokens(const SelectArgs& args, cudaStream_t stream);

}  // namespace lrc
