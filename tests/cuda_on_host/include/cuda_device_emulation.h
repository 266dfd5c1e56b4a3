// SPDX-License-Identifier: Apache-2.0
// The functions that device code calls: barriers, warp exchanges, atomics, bits of numbers.
#pragma once
#include "cuda_emulation.h"

inline void __syncthreads() {
  emulation::barrier(0);
}
inline int __syncthreads_count(int predicate) {
  return emulation::barrier(predicate);
}
inline int __syncthreads_or(int predicate) {
  return emulation::barrier(predicate) > 0;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emulation::exchange("__syncwarp", mask, 0);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle("__shfl_sync", mask, value, source & (width - 1), width, true);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = static_cast<int>(emulation::block.current % warpSize), source = lane ^ lane_mask;
  return emulation::shuffle("__shfl_xor_sync", mask, value, source % width, width, source / width <= lane / width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = static_cast<int>(emulation::block.current % width) - static_cast<int>(delta);
  return emulation::shuffle("__shfl_up_sync", mask, value, source, width, source >= 0);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int source = static_cast<int>(emulation::block.current % width) + static_cast<int>(delta);
  return emulation::shuffle("__shfl_down_sync", mask, value, source, width, source < width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulation::exchange("__ballot_sync", mask, predicate != 0);
  unsigned result = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    result |= (mask >> lane & 1u & static_cast<unsigned>(values[lane])) << lane;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}

// Threads switch only where they wait, so a plain read and write is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = value < old ? value : old;
  return old;
}
template <typename T>
T atomicExch(T* address, T value) {
  return std::exchange(*address, value);
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline int __popc(unsigned value) {
  return __builtin_popcount(value);
}
inline int __ffs(int value) {
  return __builtin_ffs(value);
}
inline int __clz(int value) {
  return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value));
}
inline unsigned __float_as_uint(float value) {
  return emulation::from_bits<unsigned>(emulation::to_bits(value));
}
inline float __uint_as_float(unsigned value) {
  return emulation::from_bits<float>(emulation::to_bits(value));
}
inline int __float_as_int(float value) {
  return static_cast<int>(__float_as_uint(value));
}
inline float __int_as_float(int value) {
  return __uint_as_float(static_cast<unsigned>(value));
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __expf(float value) {
  return std::exp(value);
}
inline float rsqrtf(float value) {
  return 1.0f / std::sqrt(value);
}
using std::max;
using std::min;
