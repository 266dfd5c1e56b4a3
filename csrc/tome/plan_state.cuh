// SPDX-License-Identifier: Apache-2.0
// What the stages of the matching schedule share: the workspace of a launch, the team of blocks that owns a segment,
// the segment before an iteration.
#pragma once
#include "match.cuh"

namespace lrc {
namespace {

/// Of a token that is not in the list of merging ones.
constexpr uint64_t kNoKey = ~uint64_t{0};

/// Per token of all segments. A segment keeps its place in each of them, from its first token on.
struct Workspace {
  /// [2, num_tokens, row_words]. The unit vectors of an iteration, then in the same place the metric of the next and
  /// behind it the sums of the chunks; the other half holds the metric of this iteration.
  uint32_t* vectors;
  uint64_t* rank_key;
  uint64_t* list_key;
  /// In set order: A, then B.
  float* score;
  int32_t* partner;
  int32_t* order;
  uint8_t* state;
  /// The row of each token in the next iteration; -1 - row if it merges with weight 0.
  int32_t* new_row;
  /// The merging tokens by partner, ascending in each: token, index of the partner in B, weight; sums of the chunks.
  int32_t* list_token;
  int32_t* list_row;
  float* list_weight;
  float* list_size;
  /// Positions of the list that belong to each token of B.
  int32_t* list_first;
  int32_t* list_end;
  /// [2, num_tokens]: before and after an iteration.
  float* size;
  int32_t* anchor;
  uint8_t* is_protected;
};

/// Hands out 256-byte aligned arrays; without a base it only counts.
struct Carver {
  unsigned char* base;
  int64_t bytes = 0;

  template <typename T>
  void take(T*& pointer, int64_t count) {
    pointer = base ? reinterpret_cast<T*>(base + bytes) : nullptr;
    bytes += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
  }
};

int padded_channels(int64_t num_channels) {
  return static_cast<int>(ceil_div(num_channels, 16) * 16);
}

int64_t carve(Workspace& w, void* base, int64_t n, int64_t num_channels) {
  Carver carver{static_cast<unsigned char*>(base)};
  carver.take(w.vectors, 2 * n * padded_channels(num_channels));
  for (auto* keys : {&w.rank_key, &w.list_key}) carver.take(*keys, n);
  for (auto* indices : {&w.partner, &w.order, &w.new_row, &w.list_token, &w.list_row, &w.list_first, &w.list_end}) {
    carver.take(*indices, n);
  }
  for (auto* values : {&w.score, &w.list_weight, &w.list_size}) carver.take(*values, n);
  carver.take(w.state, n);
  carver.take(w.size, 2 * n);
  carver.take(w.anchor, 2 * n);
  carver.take(w.is_protected, 2 * n);
  return carver.bytes;
}

/// The blocks that share a segment, and this thread's place among them.
struct Team {
  int size;
  int rank;

  __device__ int thread() const { return rank * kThreads + static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return size * kThreads; }
  __device__ int warp() const { return thread() / 32; }
  __device__ int warps() const { return size * kWarps; }
  /// What a thread of the team wrote before it, every thread of the team sees after it.
  __device__ void barrier() const {
    if (size == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }
};

/// A segment before an iteration. Null pointers mean: size 1, the token's own index, no flag, the odd tokens.
struct Segment {
  int n;
  int n_a;
  int n_b;
  const float* metric;
  int64_t metric_stride;
  const float* size;
  const int32_t* anchor;
  const uint8_t* is_protected;
  const int32_t* order;

  __device__ int token(int set_position) const {
    if (order) return order[set_position];
    return set_position < n_a ? 2 * set_position : 2 * (set_position - n_a) + 1;
  }
  __device__ float weight(int token) const { return size ? size[token] : 1.0f; }
};

/// The workspace of the segment that starts at token `start`.
__device__ Workspace of_segment(Workspace w, int64_t start, int row_words) {
  w.vectors += start * row_words;
  w.rank_key += start, w.list_key += start, w.score += start, w.partner += start, w.order += start, w.state += start;
  w.new_row += start, w.list_token += start, w.list_row += start, w.list_weight += start, w.list_size += start;
  w.list_first += start, w.list_end += start;
  w.size += start, w.anchor += start, w.is_protected += start;
  return w;
}

}  // namespace
}  // namespace lrc
