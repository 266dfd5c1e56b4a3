// SPDX-License-Identifier: Apache-2.0
// The kept rows of the residual stream, gathered and normalised: a row is read once and held in registers between the
// sum of its squares and the product with the weight.
#include "lrc/common.cuh"
#include "lrc/token_dropout.h"

namespace lrc {
namespace {

/// Vectors of a row that one thread holds: with 16-byte vectors, 1024 threads hold 32,768 16-bit elements.
constexpr int kHeld = 4;
constexpr int kMaxThreads = 1024;

/// The sum over the block, in an order that depends on the block's size alone.
__device__ float block_sum(float value, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  for (int warp = 0; warp < warps; ++warp) total += shared[warp];
  return total;
}

/// Grid: one block per kept row; its threads hold kHeld vectors of SIZE elements each.
template <typename T, int SIZE>
__global__ void __launch_bounds__(kMaxThreads)
    drop_tokens_rmsnorm_kernel(const T* __restrict__ residual, int64_t row_stride, const T* __restrict__ weight,
                               float eps, const int32_t* __restrict__ indices, int width, T* __restrict__ dropped,
                               T* __restrict__ normed, float* __restrict__ rstd) {
  using Vec = Vector<T, SIZE>;
  LRC_DYNAMIC_SHARED(float, shared);
  const int64_t row = blockIdx.x;
  const int64_t source_row = indices[row];
  const T* const source = residual + (source_row < 0 ? 0 : source_row) * row_stride;
  T* const target = dropped + row * width;
  const int step = blockDim.x * SIZE;
  Vec held[kHeld] = {};
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int d = threadIdx.x * SIZE + j * step;
    if (d >= width) break;
    if (source_row >= 0) held[j] = *reinterpret_cast<const Vec*>(source + d);
    *reinterpret_cast<Vec*>(target + d) = held[j];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const float value = to_float(held[j].data[i]);
      squares += value * value;
    }
  }
  const float mean = block_sum(squares, shared) / width;
  // A padding row has no root to take: with eps = 0 it would be 0 / 0.
  const float scale = source_row < 0 ? 0.0f : 1.0f / sqrtf(mean + eps);
  if (threadIdx.x == 0) rstd[row] = scale;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int d = threadIdx.x * SIZE + j * step;
    if (d >= width) break;
    const Vec factor = *reinterpret_cast<const Vec*>(weight + d);
    Vec out;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const T unit = from_float<T>(to_float(held[j].data[i]) * scale);
      out.data[i] = from_float<T>(to_float(unit) * to_float(factor.data[i]));
    }
    *reinterpret_cast<Vec*>(normed + row * width + d) = out;
  }
}

template <typename T, int SIZE>
void launch_rmsnorm(const void* residual, int64_t row_stride, const void* weight, float eps, const int32_t* indices,
                    int64_t num_rows, int width, void* dropped, void* normed, float* rstd, cudaStream_t stream) {
  int threads = 32;
  while (threads < kMaxThreads && threads * SIZE * 2 < width) threads *= 2;
  require(int64_t{threads} * SIZE * kHeld >= width, "width must be at most " + std::to_string(threads * SIZE * kHeld) +
                                                        " for these addresses, got " + std::to_string(width));
  launch("drop_tokens_rmsnorm", drop_tokens_rmsnorm_kernel<T, SIZE>, grid_x(num_rows), dim3(threads),
         threads / 32 * sizeof(float), stream, static_cast<const T*>(residual), row_stride,
         static_cast<const T*>(weight), eps, indices, width, static_cast<T*>(dropped), static_cast<T*>(normed), rstd);
}

}  // namespace

void drop_tokens_rmsnorm(const void* residual, DType dtype, int64_t row_stride, const void* weight, float eps,
                         const int32_t* indices, int64_t num_rows, int64_t width, void* dropped, void* normed,
                         float* rstd, cudaStream_t stream) {
  check_at_least("num_rows", num_rows, 0);
  check_at_least("width", width, 1);
  require(width < (int64_t{1} << 30), "width must be < 2^30, got " + std::to_string(width));
  if (num_rows == 0) return;
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int size_of_vector = kVectorSize<T>;
    const bool vectors = width % size_of_vector == 0 && row_stride % size_of_vector == 0 && is_aligned(residual, 16) &&
                         is_aligned(weight, 16) && is_aligned(dropped, 16) && is_aligned(normed, 16);
    auto run = vectors ? launch_rmsnorm<T, size_of_vector> : launch_rmsnorm<T, 1>;
    run(residual, row_stride, weight, eps, indices, num_rows, static_cast<int>(width), dropped, normed, rstd, stream);
  });
}

}  // namespace lrc
