// SPDX-License-Identifier: Apache-2.0
// Rows of several tensors by one index, in one launch: hidden states, labels and position ids of a drop. Rows move as
// bytes, in the widest vectors that their addresses allow, up to 16 bytes.
#include "lrc/common.cuh"
#include "lrc/token_dropout.h"

namespace lrc {
namespace {

constexpr int kThreads = 256;
/// Vectors that a thread loads before it stores the first.
constexpr int kInFlight = 4;

/// A RowMove with what its blocks need: 2^log_lanes threads move one row.
struct Entry {
  RowMove move;
  int64_t first_block;
  int log_lanes;
  int vector_bytes;
};

struct Table {
  Entry entries[kMaxRowMoves];
};

struct alignas(16) Bytes16 {
  uint64_t half[2];
};

template <typename Vec>
__device__ Vec filled(uint64_t pattern) {
  return static_cast<Vec>(pattern);
}
template <>
__device__ Bytes16 filled<Bytes16>(uint64_t pattern) {
  return {{pattern, pattern}};
}

template <typename Vec>
__device__ void move_row(const RowMove& move, int64_t outer, int64_t source_row, int64_t target_row, int64_t num_rows,
                         int lane, int lanes) {
  const int64_t size = move.row_bytes / static_cast<int64_t>(sizeof(Vec));
  const Vec* const source =
      reinterpret_cast<const Vec*>(static_cast<const char*>(move.source) + outer * move.source_outer_stride +
                                   (source_row < 0 ? 0 : source_row) * move.source_row_stride);
  Vec* const target =
      reinterpret_cast<Vec*>(static_cast<char*>(move.target) + (outer * num_rows + target_row) * move.row_bytes);
  const Vec absent = filled<Vec>(move.fill);
  for (int64_t first = lane; first < size; first += int64_t{kInFlight} * lanes) {
    Vec values[kInFlight];
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = first + int64_t{j} * lanes;
      values[j] = source_row >= 0 && i < size ? source[i] : absent;
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int64_t i = first + int64_t{j} * lanes;
      if (i < size) target[i] = values[j];
    }
  }
}

/// Grid: the blocks of the first tensor, then those of the next. A block moves kThreads >> log_lanes rows.
__global__ void __launch_bounds__(kThreads)
    move_rows_kernel(const Table table, int count, const int32_t* __restrict__ index, int64_t num_rows) {
  int at = 0;
  while (at + 1 < count && static_cast<int64_t>(blockIdx.x) >= table.entries[at + 1].first_block) ++at;
  const Entry& entry = table.entries[at];
  const int lanes = 1 << entry.log_lanes;
  const int64_t rows_per_block = kThreads >> entry.log_lanes;
  const int64_t row =
      (static_cast<int64_t>(blockIdx.x) - entry.first_block) * rows_per_block + (threadIdx.x >> entry.log_lanes);
  if (row >= entry.move.outer * num_rows) return;
  const int64_t outer = row / num_rows;
  const int64_t target_row = row - outer * num_rows;
  const int64_t source_row = index[target_row];
  const int lane = threadIdx.x & (lanes - 1);
  switch (entry.vector_bytes) {
    case 16:
      return move_row<Bytes16>(entry.move, outer, source_row, target_row, num_rows, lane, lanes);
    case 8:
      return move_row<uint64_t>(entry.move, outer, source_row, target_row, num_rows, lane, lanes);
    case 4:
      return move_row<uint32_t>(entry.move, outer, source_row, target_row, num_rows, lane, lanes);
    case 2:
      return move_row<uint16_t>(entry.move, outer, source_row, target_row, num_rows, lane, lanes);
    default:
      return move_row<uint8_t>(entry.move, outer, source_row, target_row, num_rows, lane, lanes);
  }
}

int widest_vector(const RowMove& move) {
  const uint64_t together = reinterpret_cast<uintptr_t>(move.source) | reinterpret_cast<uintptr_t>(move.target) |
                            static_cast<uint64_t>(move.row_bytes) | static_cast<uint64_t>(move.source_outer_stride) |
                            static_cast<uint64_t>(move.source_row_stride) | 16u;
  return static_cast<int>(together & (~together + 1));
}

}  // namespace

void move_rows(const RowMove* moves, int64_t count, const int32_t* index, int64_t num_rows, cudaStream_t stream) {
  require(count >= 0 && count <= kMaxRowMoves,
          "count must be between 0 and " + std::to_string(kMaxRowMoves) + ", got " + std::to_string(count));
  check_at_least("num_rows", num_rows, 0);
  Table table = {};
  int used = 0;
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const RowMove& move = moves[i];
    check_at_least("outer", move.outer, 0);
    check_at_least("row_bytes", move.row_bytes, 0);
    if (move.outer == 0 || move.row_bytes == 0 || num_rows == 0) continue;
    Entry& entry = table.entries[used++];
    entry.move = move;
    entry.first_block = blocks;
    entry.vector_bytes = widest_vector(move);
    const int64_t size = move.row_bytes / entry.vector_bytes;
    while (1 << entry.log_lanes < kThreads && (int64_t{kInFlight} << entry.log_lanes) < size) ++entry.log_lanes;
    blocks += ceil_div(move.outer * num_rows, kThreads >> entry.log_lanes);
  }
  if (used == 0) return;
  launch("move_rows", move_rows_kernel, grid_x(blocks), dim3(kThreads), 0, stream, table, used, index, num_rows);
}

}  // namespace lrc
