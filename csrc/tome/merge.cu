// SPDX-License-Identifier: Apache-2.0
// Token merging: y[j] = sum, mean or maximum of the tokens that a plan assigns to row j. A block owns a slice of the
// channels and a window of a segment's rows, which lie in shared memory in fp32, and streams the segment's tokens in
// ascending order: no atomics, no sort, x read once in place, and the same time whether the tokens spread over all rows
// or half of them go to one. The blocks of a segment are neighbours, so that the segments in flight fit in L2.
#include "token_rows.cuh"

namespace lrc {
namespace {

constexpr int kMaxThreads = 64;
/// Channels of a thread, and tokens that it adds at once.
constexpr int kLanes = 2, kTogether = 4;
/// Tokens whose features a thread loads at once: 128 bytes, and as many again before these are added.
template <typename T>
constexpr int kInFlight = 64 / static_cast<int>(sizeof(T));
/// Tokens that a thread looks at before the block adds the queued ones of its window, and room for two such rounds.
constexpr int kScan = 4;
constexpr int kQueue = 2 * kScan * kMaxThreads;
/// Shared memory for the rows of a window. Three blocks of 128 rows fit on a multiprocessor of sm_90, two on sm_80.
constexpr int kWindowBytes = 65536;

/// Tokens of the window, ascending.
struct Queue {
  int64_t offset[kQueue];
  int row[kQueue];
  float weight[kQueue];
  int warp_totals[kScan][kMaxThreads / 32];
};

struct MergeShape {
  RowIndex rows;
  /// Of the token, and of a window.
  int width;
  int window;
  int num_slices;
  int num_windows;
};

/// Appends the window's tokens of [start, start + kScan * threads) to the queue; returns its new length.
__device__ int enqueue(const MergeArgs& args, const MergeShape& shape, int64_t start, int64_t end, int64_t first_row,
                       int num_rows, Queue& queue, int length) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, num_warps = blockDim.x / 32;
  int64_t row[kScan];
  float weight[kScan];
  uint32_t votes[kScan];
#pragma unroll
  for (int j = 0; j < kScan; ++j) {
    const int64_t token = start + j * blockDim.x + threadIdx.x;
    row[j] = token < end ? args.assign[token] - first_row : -1;
    weight[j] = token < end && args.weight ? args.weight[token] : 1.0f;
  }
#pragma unroll
  for (int j = 0; j < kScan; ++j) {
    // A weight of 0 leaves the token out: whatever it holds must not reach the row.
    votes[j] = __ballot_sync(0xFFFFFFFFu, row[j] >= 0 && row[j] < num_rows && weight[j] != 0.0f);
    if (lane == 0) queue.warp_totals[j][warp] = __popc(votes[j]);
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kScan; ++j) {
    int place = length + __popc(votes[j] & ((1u << lane) - 1));
    for (int w = 0; w < num_warps; ++w) {
      place += w < warp ? queue.warp_totals[j][w] : 0;
      length += queue.warp_totals[j][w];
    }
    if (votes[j] >> lane & 1) {
      queue.offset[place] = shape.rows.token(start + j * blockDim.x + threadIdx.x);
      queue.row[place] = static_cast<int>(row[j]);
      queue.weight[place] = weight[j];
    }
  }
  __syncthreads();
  return length;
}

template <bool MAX>
__device__ float combine(float sum, float value, float weight) {
  if (!MAX) return sum + value * weight;
  return value > sum || value != value ? value : sum;
}

/// Adds the queued tokens to the window's rows. Four tokens are added at once: the row of each is either in shared
/// memory or, where an earlier one of the four has the same row, what that one left; so a hub takes no longer.
template <typename T, int SIZE, bool MAX>
__device__ void drain(const Queue& queue, int length, const T* source, float* rows, int stride) {
  using Vec = Vector<T, SIZE>;
  using Sums = Vector<float, SIZE>;
  constexpr int kBatch = kInFlight<T>;
  Vec next[kBatch];
  const auto load = [&](int first) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j < length) next[j] = *reinterpret_cast<const Vec*>(source + queue.offset[first + j]);
    }
  };
  load(0);
  for (int first = 0; first < length; first += kBatch) {
    Vec values[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) values[j] = next[j];
    load(first + kBatch);
#pragma unroll
    for (int group = 0; group < kBatch; group += kTogether) {
      if (first + group >= length) break;
      int row[kTogether];
      Sums sums[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        const int at = first + group + j;
        row[j] = at < length ? queue.row[at] : -1;
        if (row[j] >= 0) sums[j] = *reinterpret_cast<const Sums*>(rows + row[j] * stride);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (row[j] < 0) break;
        const float weight = queue.weight[first + group + j];
#pragma unroll
        for (int before = 0; before < j; ++before) {
          if (row[before] == row[j]) sums[j] = sums[before];
        }
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
          sums[j].data[i] = combine<MAX>(sums[j].data[i], to_float(values[group + j].data[i]), weight);
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (row[j] >= 0) *reinterpret_cast<Sums*>(rows + row[j] * stride) = sums[j];
      }
    }
  }
}

/// Grid: segments, of each the windows of its rows, of each the slices of the channels.
template <typename T, int SIZE, bool MAX>
__global__ void __launch_bounds__(kMaxThreads, 4) merge_rows_kernel(const MergeArgs args, const MergeShape shape) {
  LRC_DYNAMIC_SHARED(unsigned char, shared);
  Queue& queue = *reinterpret_cast<Queue*>(shared);
  const int stride = blockDim.x * SIZE;
  float* const rows = reinterpret_cast<float*>(shared + sizeof(Queue)) + threadIdx.x * SIZE;
  const int64_t segment = blockIdx.x / (shape.num_windows * shape.num_slices);
  const int rest = blockIdx.x % (shape.num_windows * shape.num_slices);
  const int channel = rest % shape.num_slices * stride + threadIdx.x * SIZE;
  const bool live = channel < shape.width;
  const int piece = live ? channel / shape.rows.width : 0;
  const T* const source =
      static_cast<const T*>(args.x) + (live ? shape.rows.piece(piece) + (channel - piece * shape.rows.width) : 0);
  const int64_t start = args.cu_seqlens_in[segment], end = args.cu_seqlens_in[segment + 1];
  const int64_t end_row = args.cu_seqlens_out[segment + 1];
  int64_t first_row = args.cu_seqlens_out[segment] + int64_t{rest / shape.num_slices} * shape.window;
  for (; first_row < end_row; first_row += int64_t{shape.num_windows} * shape.window) {
    const int num_rows = static_cast<int>(min(end_row - first_row, static_cast<int64_t>(shape.window)));
    for (int row = 0; row < num_rows; ++row) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) rows[row * stride + i] = MAX ? -INFINITY : 0.0f;
    }
    int length = 0;
    const int tile = kScan * blockDim.x;
    for (int64_t token = start; token < end; token += tile) {
      length = enqueue(args, shape, token, end, first_row, num_rows, queue, length);
      if (length <= kQueue - tile && token + tile < end) continue;
      if (live) drain<T, SIZE, MAX>(queue, length, source, rows, stride);
      length = 0;
      __syncthreads();
    }
    for (int row = 0; live && row < num_rows; ++row) {
      const float size = args.size[first_row + row];
      Vector<T, SIZE> values;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        float value = rows[row * stride + i];
        if (args.reduction == Reduction::kMean) value /= size;
        if (args.reduction != Reduction::kSum && size == 0.0f) value = 0.0f;
        values.data[i] = from_float<T>(value);
      }
      T* const target = static_cast<T*>(args.y) + (first_row + row) * shape.width + channel;
      *reinterpret_cast<Vector<T, SIZE>*>(target) = values;
    }
  }
}

template <typename T, int SIZE, bool MAX>
void launch_merge(const MergeArgs& args, MergeShape shape, cudaStream_t stream) {
  const int threads = shape.width > 32 * SIZE ? kMaxThreads : 32;
  const int64_t row_bytes = int64_t{threads} * SIZE * static_cast<int64_t>(sizeof(float));
  // Segments of one length need exactly the average; longer ones take more windows or more rounds of them.
  const int64_t average = ceil_div(args.num_out, args.num_segments);
  const int64_t limit = kWindowBytes / row_bytes;
  shape.num_slices = static_cast<int>(ceil_div(shape.width, int64_t{threads} * SIZE));
  shape.num_windows = static_cast<int>(ceil_div(average, limit));
  shape.window = static_cast<int>(ceil_div(average, shape.num_windows));
  const size_t bytes = sizeof(Queue) + static_cast<size_t>(shape.window * row_bytes);
  auto* const kernel = merge_rows_kernel<T, SIZE, MAX>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Queue) + kWindowBytes),
        "merge_rows");
  launch("merge_rows", kernel, grid_x(args.num_segments * shape.num_windows * shape.num_slices), dim3(threads), bytes,
         stream, args, shape);
}

}  // namespace

void merge_rows(const MergeArgs& args, cudaStream_t stream) {
  MergeShape shape = {};
  shape.rows = checked_rows(args.rows, args.num_tokens);
  shape.width = shape.rows.shuffle * shape.rows.shuffle * shape.rows.width;
  check_at_least("num_segments", args.num_segments, 0);
  check_at_least("num_out", args.num_out, 0);
  const int reduction = static_cast<int>(args.reduction);
  require(reduction >= 0 && reduction <= 2,
          "reduction must be 0 (sum), 1 (mean) or 2 (max), got " + std::to_string(reduction));
  if (args.num_out == 0 || args.num_segments == 0 || shape.width == 0) return;
  dispatch_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    const int bytes = kLanes * static_cast<int>(sizeof(T));
    const bool vectors = rows_are_aligned(shape.rows, args.x, kLanes, bytes) && is_aligned(args.y, bytes);
    const bool maximum = args.reduction == Reduction::kMax;
    auto run = vectors ? launch_merge<T, kLanes, false> : launch_merge<T, 1, false>;
    if (maximum) run = vectors ? launch_merge<T, kLanes, true> : launch_merge<T, 1, true>;
    run(args, shape, stream);
  });
}

}  // namespace lrc
