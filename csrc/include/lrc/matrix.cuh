// SPDX-License-Identifier: Apache-2.0
// What plain CUDA C++ has no words for: tensor-core products of 16-bit matrices, copies that run while a thread goes
// on, and the barrier of a cluster of blocks. The emulation in tests/cuda_on_host brings definitions of its own.
#pragma once
#include "lrc/common.cuh"

namespace lrc {

#ifndef LRC_MATRIX_INSTRUCTIONS
#define LRC_MATRIX_INSTRUCTIONS

/// Four 8x8 matrices of 16-bit elements from shared memory. Lane i brings the 16-byte row i % 8 of matrix i / 8, and
/// gets of each matrix the elements 2 * (lane % 4) and the next of row lane / 4.
__device__ inline void load_matrices(uint32_t (&values)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(address)
               : "memory");
}

/// d[16, 8] += a[16, 16] * b[16, 8] in fp32, in the register layout of mma.m16n8k16.
template <typename T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Starts a copy of 16 bytes from global to shared memory; both addresses are multiples of 16.
__device__ inline void start_copy(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

/// Closes a group: the copies that this thread started since the last call, possibly none.
__device__ inline void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

/// Waits until all but the latest PENDING groups of this thread have arrived.
template <int PENDING>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

/// Waits for every thread of the cluster; what any of them wrote to global memory before is visible after it.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}
#endif

/// `launch`, with every `cluster` neighbouring blocks on one group of multiprocessors, resident together (sm_90).
template <typename... Params, typename... Args>
void launch_clusters(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, int cluster,
                     size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

}  // namespace lrc
