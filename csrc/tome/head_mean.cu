// SPDX-License-Identifier: Apache-2.0
// The matching metric: the mean of a token's heads, in fp32, read once from the features where they lie.
// A thread owns one vector of the metric's channels and walks the heads in ascending order, so every sum is
// deterministic; neighbouring threads read neighbouring channels, and the loads of several heads are in flight at once.
#include "token_rows.cuh"

namespace lrc {
namespace {

constexpr int kThreads = 256;

/// Grid: one thread per vector of SIZE channels of metric [num_tokens, head_dim], flat.
template <typename T, int SIZE, bool PIECES>
__global__ void __launch_bounds__(kThreads)
    head_mean_kernel(const T* __restrict__ x, float* __restrict__ metric, int64_t num_vectors, int head_dim,
                     int num_heads, RowIndex rows) {
  using Vec = Vector<T, SIZE>;
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (vector >= num_vectors) return;
  const int vectors_per_token = head_dim / SIZE;
  const int64_t token = vector / vectors_per_token;
  const int k = static_cast<int>(vector - token * vectors_per_token) * SIZE;
  const T* source = x + rows.token(token);
  float sums[SIZE] = {};
  int piece = PIECES ? k / rows.width : 0;
  int channel = k - piece * rows.width;
#pragma unroll 4
  for (int head = 0; head < num_heads; ++head) {
    const int64_t offset = PIECES ? rows.piece(piece) + channel : channel;
    const Vec values = *reinterpret_cast<const Vec*>(source + offset);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) sums[i] += to_float(values.data[i]);
    if (!PIECES) source += head_dim;
    if (PIECES) {
      channel += head_dim;
      while (channel >= rows.width) {
        channel -= rows.width;
        ++piece;
      }
    }
  }
  constexpr int kStore = SIZE < 4 ? SIZE : 4;
  const float scale = 1.0f / num_heads;
#pragma unroll
  for (int i = 0; i < SIZE; i += kStore) {
    Vector<float, kStore> mean;
#pragma unroll
    for (int j = 0; j < kStore; ++j) mean.data[j] = sums[i + j] * scale;
    *reinterpret_cast<Vector<float, kStore>*>(metric + token * head_dim + k + i) = mean;
  }
}

template <typename T, int SIZE, bool PIECES>
void launch_head_mean(const void* x, const RowIndex& rows, int64_t num_tokens, int head_dim, int num_heads,
                      float* metric, cudaStream_t stream) {
  const int64_t num_vectors = num_tokens * (head_dim / SIZE);
  launch("head_mean", head_mean_kernel<T, SIZE, PIECES>, grid_x(ceil_div(num_vectors, kThreads)), dim3(kThreads), 0,
         stream, static_cast<const T*>(x), metric, num_vectors, head_dim, num_heads, rows);
}

}  // namespace

void head_mean(const void* x, DType dtype, const TokenRows& rows, int64_t num_tokens, int64_t num_heads, float* metric,
               cudaStream_t stream) {
  const RowIndex index = checked_rows(rows, num_tokens);
  const int heads = checked_int("num_heads", num_heads, 1);
  const int dim = index.shuffle * index.shuffle * index.width;
  require(dim % heads == 0,
          "num_heads must divide the token width " + std::to_string(dim) + ", got " + std::to_string(heads));
  if (num_tokens == 0 || dim == 0) return;
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int size_of_vector = kVectorSize<T>;
    const int head_dim = dim / heads;
    const bool vectors =
        head_dim % size_of_vector == 0 && rows_are_aligned(index, x, size_of_vector) && is_aligned(metric, 16);
    auto run = vectors ? launch_head_mean<T, size_of_vector, true> : launch_head_mean<T, 1, true>;
    if (index.shuffle == 1) run = vectors ? launch_head_mean<T, size_of_vector, false> : launch_head_mean<T, 1, false>;
    run(x, index, num_tokens, head_dim, heads, metric, stream);
  });
}

}  // namespace lrc
