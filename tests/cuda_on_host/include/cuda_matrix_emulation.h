// SPDX-License-Identifier: Apache-2.0
// The instructions that lrc/matrix.cuh wraps, as the PTX manual describes them: matrices spread over the lanes of a
// warp, asynchronous copies that arrive only when they are waited for, the barrier of a cluster.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"

#define LRC_MATRIX_INSTRUCTIONS

namespace lrc {

inline void load_matrices(uint32_t (&values)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw std::runtime_error("ldmatrix: a row is not aligned to 16 bytes");
  const uint64_t* rows = emulation::exchange("ldmatrix", 0xFFFFFFFFu, emulation::to_bits(row));
  const unsigned lane = emulation::block.current % warpSize;
  for (unsigned m = 0; m < 4; ++m) {
    const char* source = emulation::from_bits<const char*>(rows[8 * m + lane / 4]);
    std::memcpy(&values[m], source + lane % 4 * 4, 4);
  }
}

template <typename T>
inline float element(uint64_t bits, unsigned index);
template <>
inline float element<__half>(uint64_t bits, unsigned index) {
  return __half2float(__half{static_cast<uint16_t>(bits >> 16 * index)});
}
template <>
inline float element<__nv_bfloat16>(uint64_t bits, unsigned index) {
  return __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(bits >> 16 * index)});
}

template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto gather = [](uint32_t low, uint32_t high, uint64_t (&lanes)[32]) {
    const uint64_t* values = emulation::exchange("mma", 0xFFFFFFFFu, uint64_t{high} << 32 | low);
    std::memcpy(lanes, values, sizeof(lanes));
  };
  // Registers 0 and 2 of a are row lane / 4 at k = 2 * (lane % 4) and 8 further, 1 and 3 the row 8 below.
  uint64_t upper[32], lower[32], columns[32];
  gather(a[0], a[2], upper);
  gather(a[1], a[3], lower);
  gather(b[0], b[1], columns);
  const unsigned lane = emulation::block.current % warpSize;
  for (unsigned i = 0; i < 4; ++i) {
    const uint64_t* rows = i < 2 ? upper : lower;
    const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned place = k / 8 * 2 + k % 2, quad = k % 8 / 2;
      d[i] += element<T>(rows[row * 4 + quad], place) * element<T>(columns[column * 4 + quad], place);
    }
  }
}

inline void start_copy(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    throw std::runtime_error("cp.async: an address is not aligned to 16 bytes");
  }
  emulation::block.fibers[emulation::block.current].copies.back().emplace_back(shared, global);
}

inline void close_copies() {
  emulation::block.fibers[emulation::block.current].copies.emplace_back();
}

template <int PENDING>
void wait_copies() {
  auto& copies = emulation::block.fibers[emulation::block.current].copies;
  while (copies.size() > PENDING + 1) {
    for (const auto& [shared, global] : copies.front()) std::memcpy(shared, global, 16);
    copies.erase(copies.begin());
  }
}

inline void cluster_barrier() {
  emulation::arrive("barrier.cluster", emulation::block.cluster_barrier, 0);
}

}  // namespace lrc
