// SPDX-License-Identifier: Apache-2.0
// The best partner of each token of set A over all of set B, without a score matrix: tiles of the product of unit
// vectors on tensor cores, reduced to a running maximum in registers. Ties go to the lowest index throughout.
#pragma once
#include "lrc/matrix.cuh"

namespace lrc {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
/// Rows of set A that a block matches at once: one matrix tile of 16 per warp.
constexpr int kTileA = 16 * kWarps;
constexpr int kStages = 3;
/// Bytes of one stage of B: 32 columns of 128 channels in pairs of fp16.
constexpr int kStageBytes = 16384;
constexpr int kSharedBytes = kStages * kStageBytes;

/// Flags of a token.
constexpr uint8_t kHealthy = 1, kProtected = 2;

/// fp16 pairs: 256 * unit = high + low keeps 22 bits, and the factor keeps the low part above fp16's subnormal steps.
constexpr float kPairScale = 256.0f;

/// Parts of a unit vector: two of fp16 for fp32 decisions, or one of bf16.
template <typename T>
constexpr int kParts = 1;
template <>
constexpr int kParts<__half> = 2;

/// Unit vectors of a segment in set order, A then B. A row has `row_words` 32-bit words, part p from word
/// p * row_words / 2 on; the 16 * num_steps channels past the metric's hold 0.
struct Units {
  const uint32_t* words;
  const uint8_t* state;
  int row_words;
  int num_steps;
  int n_a;
  int n_b;
};

struct Best {
  float score;
  int column;
};

/// Strictly greater, or the first NaN: what torch.max takes.
__device__ inline void take(Best& best, float score, int column) {
  if (score > best.score || (score != score && best.score == best.score)) best = {score, column};
}

/// Of two maxima over different columns, that which one pass over all columns would have found.
__device__ inline void take_either(Best& best, const Best& other) {
  const bool both_nan = best.score != best.score && other.score != other.score;
  if ((best.score == other.score || both_nan) ? other.column < best.column
                                              : other.score > best.score || other.score != other.score) {
    best = other;
  }
}

/// Starts the copy of columns [column, column + COLUMNS) of B, steps [first, first + STEPS) of 16 channels, to shared
/// memory [part][column][16-byte unit], where unit u of column c lies at u ^ (c % 8): no two rows of a matrix share a
/// bank. Columns past the last hold the last.
template <int STEPS, int COLUMNS, typename T>
__device__ void start_stage(const Units& units, unsigned char* stage, int column, int first) {
  constexpr int kUnits = 2 * STEPS;
  const int live = 2 * (units.num_steps - first);
#pragma unroll
  for (int i = threadIdx.x; i < kParts<T> * COLUMNS * kUnits; i += kThreads) {
    const int unit = i % kUnits, c = i / kUnits % COLUMNS, part = i / (kUnits * COLUMNS);
    if (unit >= live) continue;
    const int64_t row = units.n_a + min(column + c, units.n_b - 1);
    const uint32_t* source =
        units.words + row * units.row_words + part * (units.row_words / 2) + (2 * first + unit) * 4;
    start_copy(stage + ((part * COLUMNS + c) * kUnits + (unit ^ (c % 8))) * 16, source);
  }
}

/// Steps [first, first + STEPS) of this warp's 16 rows of A, in the register layout of the matrix product.
template <int STEPS, typename T>
__device__ void load_rows(const Units& units, int row, int first, uint32_t (&a)[kParts<T>][STEPS][4]) {
  const int lane = threadIdx.x % 32;
  const int64_t upper = min(row + lane / 4, units.n_a - 1), lower = min(row + 8 + lane / 4, units.n_a - 1);
#pragma unroll
  for (int part = 0; part < kParts<T>; ++part) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      if (first + step >= units.num_steps) break;
      const int word = part * (units.row_words / 2) + (first + step) * 8 + lane % 4;
      const uint32_t* const above = units.words + upper * units.row_words + word;
      const uint32_t* const below = units.words + lower * units.row_words + word;
      a[part][step][0] = above[0];
      a[part][step][1] = below[0];
      a[part][step][2] = above[4];
      a[part][step][3] = below[4];
    }
  }
}

/// acc += A B^T over the first `live` steps of one stage; ALL where that is every one, so that loads of matrices can
/// run ahead of products. The product of the two low parts of fp16 pairs is below 2^-22 and left out.
template <bool ALL, int STEPS, int COLUMNS, typename T>
__device__ void multiply_stage(const uint32_t (&a)[kParts<T>][STEPS][4], const unsigned char* stage, int live,
                               float (&acc)[COLUMNS / 8][4]) {
  constexpr int kUnits = 2 * STEPS;
  const int lane = threadIdx.x % 32;
  // One load of four matrices brings both halves of 16 channels, of both parts or of two tiles of 8 columns.
  const int half = lane / 8 % 2, second = lane / 16;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    if (!ALL && step >= live) break;
#pragma unroll
    for (int tile = 0; tile < COLUMNS / 8; tile += kParts<T> == 2 ? 1 : 2) {
      const int row = kParts<T> == 2 ? second * COLUMNS + tile * 8 + lane % 8 : (tile + second) * 8 + lane % 8;
      uint32_t b[4];
      load_matrices(b, stage + (row * kUnits + ((2 * step + half) ^ (lane % 8))) * 16);
      const uint32_t front[2] = {b[0], b[1]}, back[2] = {b[2], b[3]};
      if constexpr (kParts<T> == 2) {
        multiply_add<T>(acc[tile], a[1][step], front);
        multiply_add<T>(acc[tile], a[0][step], back);
        multiply_add<T>(acc[tile], a[0][step], front);
      } else {
        multiply_add<T>(acc[tile], a[0][step], front);
        multiply_add<T>(acc[tile + 1], a[0][step], back);
      }
    }
  }
}

/// Combines the maxima of the four lanes that share rows row + lane / 4 and 8 below it, and writes score and partner.
__device__ inline void write_best(const Units& units, bool isolate, int row, Best (&best)[2], float* score,
                                  int32_t* partner) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      const Best other = {__shfl_xor_sync(0xFFFFFFFFu, best[half].score, distance),
                          __shfl_xor_sync(0xFFFFFFFFu, best[half].column, distance)};
      take_either(best[half], other);
    }
    const int i = row + half * 8 + lane / 4;
    if (lane % 4 != 0 || i >= units.n_a) continue;
    const bool lonely = isolate && !(units.state[i] & kHealthy);
    score[i] = lonely ? -INFINITY : best[half].score;
    partner[i] = lonely ? 0 : best[half].column;
  }
}

/// By a whole block: score and partner of rows [row, row + kTileA) of A. A metric of more than 16 * STEPS channels
/// comes in chunks, for which the rows of A are loaded anew.
template <int STEPS, typename T>
__device__ void match_rows(const Units& units, bool isolate, unsigned char* shared, int row, float* score,
                           int32_t* partner) {
  constexpr int kColumns = 64 / kParts<T>;
  static_assert(kParts<T> * kColumns * STEPS * 32 <= kStageBytes, "a stage holds kColumns columns");
  constexpr float kLowest = -INFINITY;
  const int lane = threadIdx.x % 32;
  const int chunks = (units.num_steps + STEPS - 1) / STEPS;
  const int num_stages = (units.n_b + kColumns - 1) / kColumns * chunks;
  row += threadIdx.x / 32 * 16;
  uint32_t a[kParts<T>][STEPS][4];
  if (chunks == 1) load_rows<STEPS, T>(units, row, 0, a);
  const auto prefetch = [&](int i) {
    if (i < num_stages) {
      start_stage<STEPS, kColumns, T>(units, shared + i % kStages * kStageBytes, i / chunks * kColumns,
                                      i % chunks * STEPS);
    }
    close_copies();
  };
  __syncthreads();
  for (int i = 0; i < kStages - 1; ++i) prefetch(i);
  Best best[2] = {{kLowest, 0}, {kLowest, 0}};
  float acc[kColumns / 8][4] = {};
  for (int i = 0; i < num_stages; ++i) {
    wait_copies<kStages - 2>();
    __syncthreads();
    prefetch(i + kStages - 1);
    const int chunk = i % chunks, column = i / chunks * kColumns;
    if (chunks > 1) load_rows<STEPS, T>(units, row, chunk * STEPS, a);
    const unsigned char* const stage = shared + i % kStages * kStageBytes;
    const int live_steps = units.num_steps - chunk * STEPS;
    if (live_steps >= STEPS) {
      multiply_stage<true, STEPS, kColumns, T>(a, stage, STEPS, acc);
    } else {
      multiply_stage<false, STEPS, kColumns, T>(a, stage, live_steps, acc);
    }
    if (chunk + 1 < chunks) continue;
#pragma unroll
    for (int word = 0; word < kColumns / 32; ++word) {
      const int mine = column + word * 32 + lane;
      const uint8_t flags = mine < units.n_b ? units.state[units.n_a + mine] : kProtected;
      const uint32_t open = __ballot_sync(0xFFFFFFFFu, !(flags & kProtected) && (flags & kHealthy || !isolate));
#pragma unroll
      for (int tile = word * 4; tile < word * 4 + 4; ++tile) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int c = tile * 8 + lane % 4 * 2 + v % 2;
          float value = kParts<T> == 2 ? acc[tile][v] * (1.0f / (kPairScale * kPairScale))
                                       : to_float(from_float<T>(acc[tile][v]));
          if (!(open >> (c % 32) & 1)) value = kLowest;
          take(best[v / 2], value, column + c);
          acc[tile][v] = 0.0f;
        }
      }
    }
  }
  write_best(units, isolate, row, best, score, partner);
}

}  // namespace
}  // namespace lrc
