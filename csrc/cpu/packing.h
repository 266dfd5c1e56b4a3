// SPDX-License-Identifier: Apache-2.0
// The pack planner: lengths and budgets in, packs of sample numbers in CSR form out. Integers and comparisons only, so
// that lrc_kernels/packing/reference.py, its specification, gives the same output bit for bit.
#pragma once

#include <cstdint>

namespace lrc::cpu {

enum class PackStrategy : int { kInOrder = 0, kOpenBestFit = 1, kFirstFit = 2, kBestFit = 3, kBestFitDecreasing = 4 };

struct PackArgs {
  const int64_t* num_tokens;  // [num_samples]
  const int64_t* num_frames;  // [num_samples]
  const double* cost;         // [num_samples]
  const uint8_t* keep;        // [num_samples] or null: all
  int64_t num_samples;
  int64_t num_kept;
  uint64_t seed;
  uint64_t epoch;
  PackStrategy strategy;
  int64_t max_tokens;
  int64_t max_frames;  // INT64_MAX: no limit
  double max_cost;     // infinity: no limit
  int64_t open_packs;
  int64_t window;
  int64_t* sample_index;  // [num_kept]
  int64_t* pack_ptr;      // [num_kept + 1], the first num_packs + 1 are written
  int64_t* pack_tokens;   // [num_kept], as pack_frames and pack_cost; the first num_packs are written
  int64_t* pack_frames;
  double* pack_cost;
};

// Returns the number of packs. Throws std::invalid_argument where a kept sample fits no pack or `keep` does not hold
// num_kept samples; then what was written is to be thrown away.
int64_t pack_samples(const PackArgs& args);

// permutation [n]: entry i of the permutation that (seed, epoch, stream, n) names.
void pack_permutation(int64_t n, uint64_t seed, uint64_t epoch, uint64_t stream, int64_t* permutation);

}  // namespace lrc::cpu
