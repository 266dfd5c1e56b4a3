// SPDX-License-Identifier: Apache-2.0
// Two normalised partial results of attention and their lse -> the result over both sets of keys.
// One pass at the speed of memory: each element is read once and written once, in vectors of up to 16 bytes.
#include <cmath>

#include "lrc/attention.h"
#include "lrc/common.cuh"

namespace lrc {
namespace {

constexpr int kThreads = 256;

/// Weights of the two sides, and the lse of both together.
struct Weights {
  float first;
  float second;
  float lse;
};

__device__ Weights weigh(float first, float second) {
  // Comparisons with NaN are false: a NaN is not finite.
  const bool has_first = fabsf(first) < INFINITY;
  const bool has_second = fabsf(second) < INFINITY;
  if (!has_first && !has_second) {
    const bool spoiled = first != first || second != second;
    return spoiled ? Weights{NAN, NAN, NAN} : Weights{0.0f, 0.0f, -INFINITY};
  }
  if (!has_second) return {1.0f, 0.0f, first};
  if (!has_first) return {0.0f, 1.0f, second};
  const float largest = fmaxf(first, second);
  const float a = expf(first - largest);
  const float b = expf(second - largest);
  const float total = a + b;
  return {a / total, b / total, largest + logf(total)};
}

/// weight * x for SIZE channels, added to `sum`; what weighs nothing is not read, for it may be NaN.
template <typename T, int SIZE>
__device__ void add_weighted(float weight, const T* x, float* sum) {
  if (weight == 0.0f) return;
  constexpr int kStep = SIZE < kVectorSize<T> ? SIZE : kVectorSize<T>;
#pragma unroll
  for (int start = 0; start < SIZE; start += kStep) {
    const auto values = *reinterpret_cast<const Vector<T, kStep>*>(x + start);
#pragma unroll
    for (int i = 0; i < kStep; ++i) sum[start + i] += weight * to_float(values.data[i]);
  }
}

/// Grid: blocks of threads over (row, head, piece of SIZE channels). The first piece of a row writes its lse.
template <typename First, typename Second, int SIZE>
__global__ void __launch_bounds__(kThreads)
    merge_partials_kernel(PartialAttention first, PartialAttention second, int64_t num_rows, int num_heads,
                          int num_pieces, int num_channels, float* __restrict__ merged,
                          float* __restrict__ merged_lse) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t item = index / num_pieces;
  const int channel = static_cast<int>(index - item * num_pieces) * SIZE;
  const int64_t row = item / num_heads;
  const int64_t head = item - row * num_heads;
  if (row >= num_rows) return;
  const Weights weights = weigh(first.lse[head * first.lse_head_stride + row * first.lse_row_stride],
                                second.lse[head * second.lse_head_stride + row * second.lse_row_stride]);
  if (channel == 0) merged_lse[head * num_rows + row] = weights.lse;
  if (num_channels == 0) return;
  Vector<float, SIZE> sum;
#pragma unroll
  for (int i = 0; i < SIZE; ++i) sum.data[i] = 0.0f;
  const First* const x = static_cast<const First*>(first.out) + row * first.row_stride + head * first.head_stride;
  const Second* const y = static_cast<const Second*>(second.out) + row * second.row_stride + head * second.head_stride;
  // NaN weights give NaN, whatever is read.
  add_weighted<First, SIZE>(weights.first, x + channel, sum.data);
  add_weighted<Second, SIZE>(weights.second, y + channel, sum.data);
  float* const target = merged + item * num_channels + channel;
  constexpr int kStep = SIZE < 4 ? SIZE : 4;
#pragma unroll
  for (int i = 0; i < SIZE; i += kStep) {
    *reinterpret_cast<Vector<float, kStep>*>(target + i) = *reinterpret_cast<const Vector<float, kStep>*>(sum.data + i);
  }
}

bool is_vectorised(const PartialAttention& partial, int64_t num_channels) {
  constexpr int kLargest = 8;
  return num_channels % kLargest == 0 && partial.row_stride % kLargest == 0 && partial.head_stride % kLargest == 0 &&
         is_aligned(partial.out, 16);
}

}  // namespace

void merge_partials(const PartialAttention& first, const PartialAttention& second, int64_t num_rows, int64_t num_heads,
                    int64_t num_channels, float* merged, float* merged_lse, cudaStream_t stream) {
  check_at_least("num_rows", num_rows, 0);
  check_at_least("num_heads", num_heads, 0);
  check_at_least("num_channels", num_channels, 0);
  require(num_heads < (int64_t{1} << 30), "num_heads must be < 2^30, got " + std::to_string(num_heads));
  require(num_channels < (int64_t{1} << 30), "num_channels must be < 2^30, got " + std::to_string(num_channels));
  if (num_rows == 0 || num_heads == 0) return;
  const bool vectors = is_vectorised(first, num_channels) && is_vectorised(second, num_channels);
  dispatch_dtype(first.dtype, [&](auto a) {
    dispatch_dtype(second.dtype, [&](auto b) {
      using First = decltype(a);
      using Second = decltype(b);
      constexpr int size = 8;
      const int64_t pieces = vectors ? num_channels / size : num_channels;
      const int64_t per_row = pieces > 1 ? pieces : 1;
      const auto kernel =
          vectors ? merge_partials_kernel<First, Second, size> : merge_partials_kernel<First, Second, 1>;
      launch("merge_partials", kernel, grid_x(ceil_div(num_rows * num_heads * per_row, kThreads)), dim3(kThreads), 0,
             stream, first, second, num_rows, static_cast<int>(num_heads), static_cast<int>(per_row),
             static_cast<int>(num_channels), merged, merged_lse);
    });
  });
}

}  // namespace lrc
