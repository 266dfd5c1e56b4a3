// SPDX-License-Identifier: Apache-2.0
// What every .cu file shares: checks, launches, dtype dispatch, 16-byte vectors of elements, dynamic shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "lrc/token_rows.h"

namespace lrc {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void check_at_least(const char* name, int64_t value, int64_t minimum) {
  require(value >= minimum,
          std::string(name) + " must be >= " + std::to_string(minimum) + ", got " + std::to_string(value));
}

/// kernel<<<grid, block, shared_bytes, stream>>>(args...) as a function call, with its error checked.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Blocks along x; the grid's limit is reached at more rows than memory can hold.
inline dim3 grid_x(int64_t blocks) {
  require(blocks >= 0 && blocks < (int64_t{1} << 31), "grid: " + std::to_string(blocks) + " blocks exceed 2^31 - 1");
  return dim3(static_cast<unsigned>(blocks), 1, 1);
}

inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

/// Calls `body` with a value-initialised element of the C++ type of `dtype`.
template <typename Body>
void dispatch_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{});
    case DType::kBFloat16:
      return body(__nv_bfloat16{});
    case DType::kFloat16:
      return body(__half{});
  }
  throw std::invalid_argument("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                              std::to_string(static_cast<int>(dtype)));
}

__host__ __device__ inline float to_float(float value) {
  return value;
}
__host__ __device__ inline float to_float(__half value) {
  return __half2float(value);
}
__host__ __device__ inline float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <typename T>
__host__ __device__ T from_float(float value);
template <>
__host__ __device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__host__ __device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// SIZE consecutive elements, moved by one instruction where they fill 16 bytes.
template <typename T, int SIZE>
struct alignas(sizeof(T) * SIZE) Vector {
  T data[SIZE];
};

/// Elements of a 16-byte vector.
template <typename T>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(T));

}  // namespace lrc

// TYPE* NAME = the block's dynamic shared memory. The emulation in tests/cuda_on_host brings a definition of its own.
#ifndef LRC_DYNAMIC_SHARED
#define LRC_DYNAMIC_SHARED(TYPE, NAME)                            \
  extern __shared__ __align__(16) unsigned char lrc_shared_raw[]; \
  TYPE* const NAME = reinterpret_cast<TYPE*>(lrc_shared_raw)
#endif
