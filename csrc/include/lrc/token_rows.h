// SPDX-License-Identifier: Apache-2.0
// How the features of tokens cross the C++ API: their element type and how they merge as numbers, and where they lie in
// memory.
#pragma once
#include <cstdint>

namespace lrc {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Reduction : int { kSum = 0, kMean = 1, kMax = 2 };

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

}  // namespace lrc
