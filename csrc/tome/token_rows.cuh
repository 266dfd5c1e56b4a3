// SPDX-License-Identifier: Apache-2.0
// Index arithmetic of TokenRows, for the kernels that read or write features in place.
#pragma once
#include "lrc/common.cuh"
#include "lrc/tome.h"

namespace lrc {

/// TokenRows with what a kernel divides by in 32 bits.
struct RowIndex {
  int width;
  int shuffle;
  int tokens_per_frame;
  int grid_width;
  int prefix;
  int64_t frame_stride;
  int64_t row_stride;

  /// The element at which the first piece of a token starts.
  __device__ int64_t token(int64_t token) const {
    const int64_t frame = token / tokens_per_frame;
    const int u = static_cast<int>(token - frame * tokens_per_frame);
    const int i = u / grid_width;
    const int64_t row = prefix + (static_cast<int64_t>(i) * shuffle * grid_width + (u - i * grid_width)) * shuffle;
    return frame * frame_stride + row * row_stride;
  }

  /// Elements from the first piece of a token to its piece p.
  __device__ int64_t piece(int p) const {
    const int di = p / shuffle;
    return (static_cast<int64_t>(di) * grid_width * shuffle + (p - di * shuffle)) * row_stride;
  }
};

/// Widths and grids are counted in 32 bits inside the kernels, with room for the last step of a loop.
inline int checked_int(const char* name, int64_t value, int64_t minimum) {
  check_at_least(name, value, minimum);
  require(value < (int64_t{1} << 30), std::string(name) + " must be < 2^30, got " + std::to_string(value));
  return static_cast<int>(value);
}

inline RowIndex checked_rows(const TokenRows& rows, int64_t num_tokens) {
  check_at_least("num_tokens", num_tokens, 0);
  RowIndex index;
  index.width = checked_int("rows.width", rows.width, 0);
  index.shuffle = checked_int("rows.shuffle", rows.shuffle, 1);
  index.tokens_per_frame = checked_int("rows.tokens_per_frame", rows.tokens_per_frame, num_tokens > 0);
  index.grid_width = checked_int("rows.grid_width", rows.grid_width, num_tokens > 0);
  index.prefix = checked_int("rows.prefix", rows.prefix, 0);
  index.frame_stride = rows.frame_stride;
  index.row_stride = rows.row_stride;
  checked_int("rows.shuffle^2 * rows.width", rows.shuffle * rows.shuffle * rows.width, 0);
  require(num_tokens == 0 || num_tokens % rows.tokens_per_frame == 0, "num_tokens must be whole frames of " +
                                                                          std::to_string(rows.tokens_per_frame) +
                                                                          " tokens, got " + std::to_string(num_tokens));
  return index;
}

/// Whether every piece can be moved in vectors of `size` elements, `bytes` bytes.
inline bool rows_are_aligned(const RowIndex& rows, const void* pointer, int size, int bytes = 16) {
  return rows.width % size == 0 && rows.frame_stride % size == 0 && rows.row_stride % size == 0 &&
         is_aligned(pointer, bytes);
}

}  // namespace lrc
