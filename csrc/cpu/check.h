// SPDX-License-Identifier: Apache-2.0
// What the host sides of the CPU kernels check before anything is written: they throw std::invalid_argument.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "lrc/token_rows.h"

namespace lrc::cpu {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void check_dtype(DType dtype) {
  require(dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
          "dtype must be 0 (fp32), 1 (bf16) or 2 (fp16), got " + std::to_string(static_cast<int>(dtype)));
}

inline void check_threads(int threads) {
  require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
}

// Returns the length of the longest segment.
inline int64_t check_cu_seqlens(const char* name, const int64_t* cu_seqlens, int64_t num_segments, int64_t total) {
  int64_t longest = 0;
  require(cu_seqlens[0] >= 0, std::string(name) + " must start at 0, got " + std::to_string(cu_seqlens[0]));
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t n = cu_seqlens[s + 1] - cu_seqlens[s];
    require(n >= 0, std::string(name) + " must not decrease, but does after segment " + std::to_string(s));
    longest = std::max(longest, n);
  }
  require(cu_seqlens[num_segments] <= total, std::string(name) + " must end within " + std::to_string(total) +
                                                 " rows, got " + std::to_string(cu_seqlens[num_segments]));
  return longest;
}

}  // namespace lrc::cpu
