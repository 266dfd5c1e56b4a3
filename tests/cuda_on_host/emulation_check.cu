// SPDX-License-Identifier: Apache-2.0
// Kernels that use each feature of the emulation, right and wrong, with a C interface; plain CUDA C++, so that nvcc
// compiles this file too.
#include "lrc/matrix.cuh"

namespace {

/// out[b] = sum of x over block b: warp shuffles, static shared memory, a barrier.
__global__ void block_sum_kernel(const float* x, float* out, int n) {
  __shared__ float partial[32];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float value = i < n ? x[i] : 0.0f;
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    if (threadIdx.x == 0) out[blockIdx.x] = value;
  }
}

/// Reverses each block's elements through dynamic shared memory; `synchronise` false plants a race.
__global__ void reverse_kernel(const float* x, float* out, bool synchronise) {
  LRC_DYNAMIC_SHARED(float, buffer);
  const int base = blockIdx.x * blockDim.x;
  buffer[threadIdx.x] = x[base + threadIdx.x];
  if (synchronise) __syncthreads();
  out[base + threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

/// Inclusive scan of each warp, the ballot of odd values, the count over the block, and a histogram by atomics; the
/// threads of the second half return early, as CUDA allows before a barrier of those that are left.
__global__ void warp_features_kernel(const int* x, int* scan, unsigned* ballot, int* count, int* histogram, int bins) {
  const int lane = threadIdx.x % 32;
  int value = x[threadIdx.x];
  const unsigned odd = __ballot_sync(0xFFFFFFFFu, value & 1);
  atomicAdd(&histogram[value % bins], 1);
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, value, offset);
    if (lane >= offset) value += other;
  }
  scan[threadIdx.x] = value;
  if (lane == 0) ballot[threadIdx.x / 32] = odd;
  if (threadIdx.x >= blockDim.x / 2) return;
  const int total = __syncthreads_count(x[threadIdx.x] & 1);
  if (threadIdx.x == 0) *count = total;
}

/// Thread 0 waits at a barrier that the others never reach, because they wait for its lane.
__global__ void deadlock_kernel(float* out) {
  float value = 1.0f;
  if (threadIdx.x == 0) {
    __syncthreads();
  } else {
    value = __shfl_sync(0xFFFFFFFFu, value, 0);
  }
  out[threadIdx.x] = value;
}

/// Fills a grid of three dimensions with each thread's position in 4 x uint16, moved as one uint2.
__global__ void position_kernel(uint2* out) {
  const int64_t block = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  uint2 value;
  value.x = blockIdx.x | blockIdx.y << 8 | blockIdx.z << 16;
  value.y = threadIdx.x | threadIdx.y << 8 | threadIdx.z << 16;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = value;
}

template <typename T>
__global__ void round_trip_kernel(const float* x, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = lrc::to_float(lrc::from_float<T>(x[i]));
}

/// d [16, 8] += a [16, 16] * b [8, 16]^T by one warp: rows copied to shared memory, fragments, one matrix product.
/// `wait` false plants a read of copies that nobody waited for.
template <typename T>
__global__ void matrix_product_kernel(const T* a, const T* b, float* d, bool wait) {
  LRC_DYNAMIC_SHARED(T, tile);
  const int lane = threadIdx.x;
  lrc::start_copy(tile + lane * 8, a + lane * 8);
  if (lane < 16) lrc::start_copy(tile + 256 + lane * 8, b + lane * 8);
  lrc::close_copies();
  if (wait) lrc::wait_copies<0>();
  __syncthreads();
  // Matrices: rows 0-7 and 8-15 of a at k = 0, then both at k = 8; of b both halves of k, twice.
  uint32_t rows[4], columns[4];
  lrc::load_matrices(rows, tile + (lane % 16) * 16 + lane / 16 * 8);
  lrc::load_matrices(columns, tile + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  const uint32_t both[2] = {columns[0], columns[1]};
  float sum[4];
  float* const target = d + lane / 4 * 8 + lane % 4 * 2;
  for (int i = 0; i < 4; ++i) sum[i] = target[i / 2 * 64 + i % 2];
  lrc::multiply_add<T>(sum, rows, both);
  for (int i = 0; i < 4; ++i) target[i / 2 * 64 + i % 2] = sum[i];
}

/// Every block of a cluster adds up what all of its blocks wrote; `synchronise` false plants a race.
__global__ void cluster_sum_kernel(const int* x, int* scratch, int* out, int cluster, bool synchronise) {
  LRC_DYNAMIC_SHARED(int, own);
  const int first = blockIdx.x / cluster * cluster;
  if (threadIdx.x == 0) *own = x[blockIdx.x];
  __syncthreads();
  if (threadIdx.x == 1) scratch[blockIdx.x] = *own;
  if (synchronise) lrc::cluster_barrier();
  int sum = 0;
  for (int i = 0; i < cluster; ++i) sum += scratch[first + i];
  if (threadIdx.x == 2) out[blockIdx.x] = sum;
}

}  // namespace

extern "C" {

void check_matrix_product(const void* a, const void* b, float* d, int bf16, int wait) {
  if (bf16) {
    lrc::launch("matrix_product", matrix_product_kernel<__nv_bfloat16>, dim3(1), dim3(32), 768, nullptr,
                static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), d, wait != 0);
  } else {
    lrc::launch("matrix_product", matrix_product_kernel<__half>, dim3(1), dim3(32), 768, nullptr,
                static_cast<const __half*>(a), static_cast<const __half*>(b), d, wait != 0);
  }
}

void check_cluster_sum(const int* x, int* scratch, int* out, int blocks, int cluster, int synchronise) {
  lrc::launch_clusters("cluster_sum", cluster_sum_kernel, dim3(blocks), dim3(32), cluster, sizeof(int), nullptr, x,
                       scratch, out, cluster, synchronise != 0);
}

void check_block_sum(const float* x, float* out, int blocks, int threads, int n) {
  lrc::launch("block_sum", block_sum_kernel, dim3(blocks), dim3(threads), 0, nullptr, x, out, n);
}

void check_reverse(const float* x, float* out, int blocks, int threads, int synchronise) {
  lrc::launch("reverse", reverse_kernel, dim3(blocks), dim3(threads), threads * sizeof(float), nullptr, x, out,
              synchronise != 0);
}

void check_warp_features(const int* x, int* scan, unsigned* ballot, int* count, int* histogram, int threads, int bins) {
  lrc::launch("warp_features", warp_features_kernel, dim3(1), dim3(threads), 0, nullptr, x, scan, ballot, count,
              histogram, bins);
}

void check_deadlock(float* out) {
  lrc::launch("deadlock", deadlock_kernel, dim3(2), dim3(32), 0, nullptr, out);
}

void check_positions(void* out, const int64_t* sizes) {
  lrc::launch("positions", position_kernel, dim3(sizes[0], sizes[1], sizes[2]), dim3(sizes[3], sizes[4], sizes[5]), 0,
              nullptr, static_cast<uint2*>(out));
}

void check_round_trip(const float* x, float* out, int n, int dtype) {
  lrc::dispatch_dtype(static_cast<lrc::DType>(dtype), [&](auto element) {
    lrc::launch("round_trip", round_trip_kernel<decltype(element)>, lrc::grid_x(lrc::ceil_div(n, 128)), dim3(128), 0,
                nullptr, x, out, n);
  });
}
}
