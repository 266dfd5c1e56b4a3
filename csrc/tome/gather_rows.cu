// SPDX-License-Identifier: Apache-2.0
// The gradient of token merging and the forward of unmerging: every token gets its group's row, scaled. In the gradient
// of a maximum it gets only what it was the first to hold, which first_tokens finds.
// y lies in L2 in the usual shapes and is read once per token; the output is written once, in 16-byte vectors.
#include "token_rows.cuh"

namespace lrc {
namespace {

constexpr int kThreads = 256;
/// Vectors that a thread loads before it stores the first.
constexpr int kInFlight = 4;

/// Grid: blocks of blockDim.y rows; rows [0, num_tokens) are tokens, the rest up to num_rows the frames' prefix rows.
/// One row of blockDim.x threads moves the vectors of one token.
template <typename T, int SIZE, bool PIECES>
__global__ void __launch_bounds__(kThreads)
    gather_rows_kernel(const T* __restrict__ y, const int32_t* __restrict__ assign, const float* __restrict__ size,
                       const float* __restrict__ weight, const uint32_t* __restrict__ first_token, T* __restrict__ x,
                       int64_t num_tokens, int64_t num_rows, int dim, RowIndex rows) {
  using Vec = Vector<T, SIZE>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_rows) return;
  const int first = threadIdx.x * SIZE;
  const int step = blockDim.x * SIZE;
  if (token >= num_tokens) {
    const int64_t frame = (token - num_tokens) / rows.prefix;
    T* const target = x + frame * rows.frame_stride + (token - num_tokens - frame * rows.prefix) * rows.row_stride;
    for (int d = first; d < rows.width; d += step) *reinterpret_cast<Vec*>(target + d) = Vec{};
    return;
  }
  const int64_t group = assign[token];
  const float numerator = weight ? weight[token] : 1.0f;
  const float denominator = size ? size[group] : 1.0f;
  // A zero is masked, never multiplied: NaN or infinity in y must not reach a token of weight 0.
  const bool masked = numerator == 0.0f || denominator == 0.0f;
  const float scale = masked ? 0.0f : numerator / denominator;
  const T* const source = y + group * dim;
  T* const target = x + rows.token(token);
  for (int start = first; start < dim; start += kInFlight * step) {
    Vec values[kInFlight] = {};
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int d = start + j * step;
      if (!masked && d < dim) values[j] = *reinterpret_cast<const Vec*>(source + d);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int d = start + j * step;
      if (d >= dim) break;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const bool held = !first_token || first_token[group * dim + d + i] == static_cast<uint32_t>(token);
        values[j].data[i] = from_float<T>(held ? to_float(values[j].data[i]) * scale : 0.0f);
      }
      const int piece = PIECES ? d / rows.width : 0;
      const int64_t offset = PIECES ? rows.piece(piece) + (d - piece * rows.width) : d;
      *reinterpret_cast<Vec*>(target + offset) = values[j];
    }
  }
}

/// Grid: blocks of blockDim.y tokens; first_token [num_out, dim] holds 2^32 - 1 before. The smallest token is
/// the same in whichever order they come, so that an atomic minimum costs no determinism.
template <typename T, int SIZE>
__global__ void __launch_bounds__(kThreads)
    first_tokens_kernel(const T* __restrict__ x, const T* __restrict__ y, const int32_t* __restrict__ assign,
                        const float* __restrict__ weight, uint32_t* first_token, int64_t num_tokens, int dim,
                        RowIndex rows) {
  using Vec = Vector<T, SIZE>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_tokens || (weight && weight[token] == 0.0f)) return;
  const int64_t row = static_cast<int64_t>(assign[token]) * dim;
  const T* const source = x + rows.token(token);
  const int step = blockDim.x * SIZE;
  for (int start = threadIdx.x * SIZE; start < dim; start += kInFlight * step) {
    Vec values[kInFlight] = {}, maxima[kInFlight] = {};
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int d = start + j * step;
      if (d >= dim) break;
      const int piece = d / rows.width;
      values[j] = *reinterpret_cast<const Vec*>(source + rows.piece(piece) + (d - piece * rows.width));
      maxima[j] = *reinterpret_cast<const Vec*>(y + row + d);
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      const int d = start + j * step;
      if (d >= dim) break;
#pragma unroll
      for (int i = 0; i < SIZE; ++i) {
        const float value = to_float(values[j].data[i]), maximum = to_float(maxima[j].data[i]);
        const bool holds = value == maximum || (value != value && maximum != maximum);
        if (holds) atomicMin(first_token + row + d + i, static_cast<uint32_t>(token));
      }
    }
  }
}

/// A row of threads for each token's channels, and as many such rows as a block holds.
template <int SIZE>
dim3 block_of_rows(int dim) {
  int lanes = 32;
  while (lanes < kThreads && lanes * SIZE * kInFlight < dim) lanes *= 2;
  return dim3(lanes, kThreads / lanes);
}

template <typename T, int SIZE>
void launch_first(const void* x, const void* y, const int32_t* assign, const float* weight, const RowIndex& rows,
                  int64_t num_tokens, uint32_t* first_token, cudaStream_t stream) {
  const int dim = rows.shuffle * rows.shuffle * rows.width;
  const dim3 block = block_of_rows<SIZE>(dim);
  launch("first_tokens", first_tokens_kernel<T, SIZE>, grid_x(ceil_div(num_tokens, block.y)), block, 0, stream,
         static_cast<const T*>(x), static_cast<const T*>(y), assign, weight, first_token, num_tokens, dim, rows);
}

template <typename T, int SIZE, bool PIECES>
void launch_gather(const void* y, const int32_t* assign, const float* size, const float* weight,
                   const uint32_t* first_token, const RowIndex& rows, int64_t num_tokens, void* x,
                   cudaStream_t stream) {
  const int dim = rows.shuffle * rows.shuffle * rows.width;
  const int64_t num_rows = num_tokens + num_tokens / rows.tokens_per_frame * rows.prefix;
  const dim3 block = block_of_rows<SIZE>(dim);
  launch("gather_rows", gather_rows_kernel<T, SIZE, PIECES>, grid_x(ceil_div(num_rows, block.y)), block, 0, stream,
         static_cast<const T*>(y), assign, size, weight, first_token, static_cast<T*>(x), num_tokens, num_rows, dim,
         rows);
}

}  // namespace

void first_tokens(const void* x, DType dtype, const TokenRows& rows, int64_t num_tokens, const void* y, int64_t num_out,
                  const int32_t* assign, const float* weight, uint32_t* first_token, cudaStream_t stream) {
  const RowIndex index = checked_rows(rows, num_tokens);
  check_at_least("num_out", num_out, 0);
  require(num_tokens < 0xFFFFFFFF, "num_tokens must be < 2^32 - 1, got " + std::to_string(num_tokens));
  const size_t elements = static_cast<size_t>(num_out) * index.shuffle * index.shuffle * index.width;
  if (elements == 0) return;
  check(cudaMemsetAsync(first_token, 0xFF, elements * sizeof(uint32_t), stream), "first_tokens");
  if (num_tokens == 0) return;
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int size_of_vector = kVectorSize<T>;
    const bool vectors = rows_are_aligned(index, x, size_of_vector) && is_aligned(y, 16);
    auto run = vectors ? launch_first<T, size_of_vector> : launch_first<T, 1>;
    run(x, y, assign, weight, index, num_tokens, first_token, stream);
  });
}

void gather_rows(const void* y, DType dtype, const int32_t* assign, const float* size, const float* weight,
                 const uint32_t* first_token, const TokenRows& rows, int64_t num_tokens, void* x, cudaStream_t stream) {
  const RowIndex index = checked_rows(rows, num_tokens);
  if (num_tokens == 0 || index.width == 0) return;
  dispatch_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int size_of_vector = kVectorSize<T>;
    const bool vectors = rows_are_aligned(index, x, size_of_vector) && is_aligned(y, 16);
    auto run = vectors ? launch_gather<T, size_of_vector, true> : launch_gather<T, 1, true>;
    if (index.shuffle == 1) run = vectors ? launch_gather<T, size_of_vector, false> : launch_gather<T, 1, false>;
    run(y, assign, size, weight, first_token, index, num_tokens, x, stream);
  });
}

}  // namespace lrc
