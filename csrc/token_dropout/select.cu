// SPDX-License-Identifier: Apache-2.0
// Which droppable tokens of a sequence stay, exactly and without a sort: one block per sequence finds the k-th largest
// 32-bit key digit by digit from counts of 256 digits, then walks the sequence once more and writes rows in order.
// Atomics only count in shared memory, where the order of the additions does not matter.
#include "lrc/common.cuh"
#include "lrc/token_dropout.h"
#include "lrc/token_key.h"

namespace lrc {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
/// Consecutive tokens of a thread in the walk that writes.
constexpr int kItems = 4;
constexpr int kBins = 256;
/// Bits of each of the three counts that one scan adds up.
constexpr int kCountBits = 21;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
constexpr uint64_t kFixed = 1, kEqual = uint64_t{1} << kCountBits, kGreater = uint64_t{1} << (2 * kCountBits);

struct Shared {
  int counts[kBins];
  uint64_t warp_totals[kWarps];
  int digit;
  int need;
};

/// The key of a token, of which the largest stay: scores in their order with NaN last and -0 = 0, or inverted words.
__device__ uint32_t token_key(const SelectArgs& args, int64_t sequence, int64_t start, int t) {
  if (args.mode == SelectMode::kTopk) return score_key(__float_as_uint(args.scores[start + t]));
  int64_t position = t;
  if (args.positions) {
    position = args.positions_are_64_bit ? static_cast<const int64_t*>(args.positions)[start + t]
                                         : static_cast<const int32_t*>(args.positions)[start + t];
  }
  const int64_t id = args.sequence_ids ? args.sequence_ids[sequence] : sequence;
  return ~token_word(static_cast<uint64_t>(*args.seed), static_cast<uint32_t>(position), args.layer,
                     static_cast<uint64_t>(id));
}

/// The counts of all threads before this one; `total` becomes that of the block.
__device__ uint64_t block_scan(uint64_t value, Shared& shared, uint64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t inclusive = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(0xFFFFFFFFu, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  if (lane == 31) shared.warp_totals[warp] = inclusive;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared.warp_totals[w];
    total += shared.warp_totals[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

/// By the first warp: the digit in which the need-th largest key lies, and how many keys of that digit are needed.
__device__ void find_digit(Shared& shared, int need) {
  constexpr int kPerLane = kBins / 32;
  const int lane = threadIdx.x;
  const int highest = kBins - 1 - lane * kPerLane;
  int sum = 0;
  for (int i = 0; i < kPerLane; ++i) sum += shared.counts[highest - i];
  int inclusive = sum;
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, inclusive, offset);
    if (lane >= offset) inclusive += other;
  }
  int above = inclusive - sum;
  // The last lane also answers where fewer keys exist than are needed, the first where none is.
  const bool mine = (above < need && (inclusive >= need || lane == 31)) || (lane == 0 && need <= 0);
  if (!mine) return;
  int digit = highest;
  for (int i = 0; i + 1 < kPerLane && above + shared.counts[digit] < need; ++i) above += shared.counts[digit--];
  shared.digit = digit;
  shared.need = need - above;
}

/// Grid: one block per sequence.
__global__ void __launch_bounds__(kThreads) select_tokens_kernel(const SelectArgs args) {
  LRC_DYNAMIC_SHARED(Shared, memory);
  Shared& shared = *memory;
  const int64_t sequence = blockIdx.x;
  const int64_t start = args.cu_seqlens_in[sequence];
  const int n = args.cu_seqlens_in[sequence + 1] - static_cast<int>(start);
  const int first_row = args.cu_seqlens_out[sequence], end_row = args.cu_seqlens_out[sequence + 1];
  const uint8_t* const droppable = args.droppable + start;
  int keep = args.keep[sequence];
  const bool linspace = args.mode == SelectMode::kLinspace;
  uint32_t threshold = 0;
  int need = keep;
  int64_t num_droppable = 0;
  if (linspace) {
    uint64_t own = 0, total;
    for (int t = threadIdx.x; t < n; t += kThreads) own += droppable[t] != 0;
    block_scan(own, shared, total);
    num_droppable = static_cast<int64_t>(total);
    keep = min(keep, static_cast<int>(total));
  }
  for (int shift = 24; !linspace && shift >= 0; shift -= 8) {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.counts[bin] = 0;
    __syncthreads();
    for (int t = threadIdx.x; t < n; t += kThreads) {
      if (!droppable[t]) continue;
      const uint32_t key = token_key(args, sequence, start, t);
      if (shift == 24 || key >> (shift + 8) == threshold) atomicAdd(&shared.counts[key >> shift & 0xFF], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(shared, need);
    __syncthreads();
    threshold = threshold << 8 | static_cast<uint32_t>(shared.digit);
    need = shared.need;
  }
  const int64_t gaps = num_droppable > 1 ? num_droppable - 1 : 1, steps = keep > 1 ? keep - 1 : 1;
  uint64_t running = 0;
  for (int tile = 0; tile < n; tile += kThreads * kItems) {
    const int first = tile + threadIdx.x * kItems;
    uint64_t kinds[kItems] = {}, own = 0, total;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int t = first + j;
      if (t >= n) break;
      if (!droppable[t]) {
        kinds[j] = kFixed;
      } else if (!linspace) {
        const uint32_t key = token_key(args, sequence, start, t);
        kinds[j] = key > threshold ? kGreater : key == threshold ? kEqual : 0;
      }
      own += kinds[j];
    }
    uint64_t before = running + block_scan(own, shared, total);
    running += total;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int t = first + j;
      if (t >= n) break;
      const int fixed = static_cast<int>(before & kCountMask);
      const int equal = static_cast<int>(before >> kCountBits & kCountMask);
      int chosen = static_cast<int>(before >> (2 * kCountBits)) + (equal < need ? equal : need);
      bool kept = kinds[j] == kFixed || kinds[j] == kGreater || (kinds[j] == kEqual && equal < need);
      if (linspace) {
        // The number of kept tokens of lower rank, which is also the only i that can give this rank.
        const int64_t rank = t - fixed;
        const int64_t i = (rank * steps + gaps - 1) / gaps;
        chosen = static_cast<int>(i < keep ? i : keep);
        kept = kept || (keep > 1 ? i < keep && i * (num_droppable - 1) / steps == rank : keep == 1 && rank == 0);
      }
      before += kinds[j];
      const int row = first_row + fixed + chosen;
      kept = kept && row < end_row;
      args.inverse[start + t] = kept ? row : -1;
      if (kept) args.indices[row] = static_cast<int32_t>(start + t);
    }
  }
}

}  // namespace

void select_tokens(const SelectArgs& args, cudaStream_t stream) {
  check_at_least("num_sequences", args.num_sequences, 0);
  check_at_least("max_seqlen", args.max_seqlen, 0);
  require(args.max_seqlen < int64_t{1} << kCountBits,
          "max_seqlen must be < 2^21, got " + std::to_string(args.max_seqlen));
  const int mode = static_cast<int>(args.mode);
  require(mode >= 0 && mode <= 2, "mode must be 0 (topk), 1 (linspace) or 2 (random), got " + std::to_string(mode));
  require(args.mode != SelectMode::kTopk || args.scores, "scores must be given for mode topk, got null");
  require(args.mode != SelectMode::kRandom || args.seed, "seed must be given for mode random, got null");
  if (args.num_sequences == 0) return;
  launch("select_tokens", select_tokens_kernel, grid_x(args.num_sequences), dim3(kThreads), sizeof(Shared), stream,
         args);
}

}  // namespace lrc
