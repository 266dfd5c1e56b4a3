// SPDX-License-Identifier: Apache-2.0
// Selection of tokens on the CPU: raw pointers and sizes; what is kept is what the CUDA and Triton kernels keep.
#pragma once
#include <cstdint>

namespace lrc::cpu {

/// How a random word is made for each row; null sequence_ids are 0 .. S - 1, null positions the row in its sequence.
struct RandomArgs {
  int64_t seed;
  uint32_t layer;
  const int64_t* sequence_ids;  // [S]
  const int64_t* positions;     // [T]
};

enum class SelectMode : int { kTopk = 0, kLinspace = 1, kRandom = 2 };

struct SelectArgs {
  SelectMode mode;
  const uint8_t* droppable;       // [T]
  const int32_t* cu_seqlens_in;   // [S + 1]
  const int32_t* cu_seqlens_out;  // [S + 1]
  const int32_t* keep;            // [S]
  const float* scores;            // [T], kTopk only
  RandomArgs random;              // kRandom only
  int64_t num_sequences;
  int32_t* indices;  // [T_keep], holding -1 before the call
  int32_t* inverse;  // [T]
  int threads;
};

/// Sequence s keeps keep[s] of its droppable tokens, ties to the lowest row, and all others.
void select_tokens(const SelectArgs& args);

struct BernoulliArgs {
  const uint8_t* droppable;   // [T]
  const int32_t* cu_seqlens;  // [S + 1]
  RandomArgs random;
  int64_t num_sequences;
  int64_t capacity;
  int64_t threshold;
  int32_t* indices;         // [capacity], holding -1 before the call
  int32_t* inverse;         // [T]
  int32_t* cu_seqlens_out;  // [S + 2]
  int32_t* num_wanted;      // [1]
  int threads;
};

/// Droppable tokens stay where their word is below threshold, until the rows that the other tokens leave are full.
void select_tokens_bernoulli(const BernoulliArgs& args);

}  // namespace lrc::cpu
