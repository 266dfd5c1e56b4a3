// SPDX-License-Identifier: Apache-2.0
// Attention scores for token dropout on the CPU: raw pointers, sizes and strides (in elements) in, one number per key
// out. Throws std::invalid_argument before it writes anything when its integers do not fit each other.
#pragma once

#include <cstdint>

#include "lrc/token_rows.h"

namespace lrc::cpu {

// Softmax statistics are those of blocks of this many keys, counted from the start of a sequence.
constexpr int64_t kScoreBlock = 128;

struct ScoreKeys {
  const void* k;
  DType dtype;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t head_stride;
  int64_t token_stride;
  // Paged keys: key j of sequence s lies in row j % block_size of block block_table[s * max_blocks + j / block_size].
  // Without a block_table key j of sequence s is token cu_seqlens[s] + j.
  const int32_t* block_table;
  int64_t block_stride;
  int64_t num_blocks;
  int64_t block_size;
  int64_t max_blocks;
  int64_t num_tokens;  // tokens that k holds (of packed keys)
};

struct ScoreArgs {
  const float* q;  // [num_rows, num_heads, head_dim]
  int64_t num_rows;
  int64_t num_heads;
  ScoreKeys keys;
  const int64_t* cu_seqlens;  // [num_sequences + 1]
  int64_t num_sequences;
  const int32_t* row_sequence;  // [num_rows]; -1: the row is left out
  const int32_t* row_position;  // [num_rows]; the row sees keys 0..position of its sequence
  const float* lse;             // [num_heads, num_rows], natural logarithm, or null
  bool max_over_heads;
  float head_scale;  // of the sum or maximum over heads
  float softmax_scale;
  float* scores;  // [num_scores]
  int64_t num_scores;
  int threads;
  // For sequences that are one block each, row r asking sequence r, of a longer sequence that others hold parts of.
  // Either is null:
  float* statistics;    // [2, num_rows, num_heads] out, instead of scores: block maximum, sum of exp(logit - maximum)
  const float* factor;  // [num_rows, num_heads] what the exponentials are multiplied by
};

void attention_scores(const ScoreArgs& args);

// What the exponentials of each block are multiplied by to become probabilities, from the statistics of all blocks.
struct FactorArgs {
  const float* maximum;  // [num_sequences, num_heads, num_blocks]
  const float* sum;      // likewise
  const int64_t* seen;   // [num_sequences] blocks that the row of each sequence sees
  int64_t num_sequences;
  int64_t num_heads;
  int64_t num_blocks;
  float* factor;  // [num_sequences, num_heads, num_blocks]; what is not seen stays as it is
};

void attention_score_factors(const FactorArgs& args);

// Some rows of one sequence against some kv heads: what fits into the scratch at once. Vector v = (head, row) with the
// row running fastest.
struct ScoreSpan {
  int64_t sequence;
  int64_t num_keys;    // that any of the rows sees
  int64_t first_task;  // blocks of the spans before this one
  int64_t first_kv_head;
  int64_t num_kv_heads;
  int64_t num_rows;
  const int64_t* row;      // [num_rows] rows of q
  const int64_t* visible;  // [num_rows] keys that each row sees
  float row_scale;         // head_scale over the sequence's number of rows: what its rows add to the scores
  void* q;                 // [vectors + spare, padded head_dim] in the format of the instruction set
  float* p;                // [blocks, vectors, kScoreBlock] exp(logit - block maximum)
  float* maximum;          // [blocks, vectors]; then the factor that turns p into probabilities
  float* sum;              // [blocks, vectors]
  float* reduced;  // [num_rows, blocks, 2, kScoreBlock]: sums over the heads so far and what they lost; null: all heads
                   // in one
  bool first_heads;
  bool last_heads;
};

// What one instruction set provides; spans of one call are independent of each other.
struct TokenDropoutKernels {
  int64_t step;  // head_dim of packed q is padded to a multiple of it
  void (*scores)(const ScoreArgs& args, const ScoreSpan* spans, int64_t num_spans);
  void (*factors)(const FactorArgs& args);
};

#define LRC_DECLARE_TOKEN_DROPOUT(isa)                   \
  namespace isa {                                        \
  extern const TokenDropoutKernels kTokenDropoutKernels; \
  }
LRC_DECLARE_TOKEN_DROPOUT(baseline)
LRC_DECLARE_TOKEN_DROPOUT(avx2)
LRC_DECLARE_TOKEN_DROPOUT(avx512)
LRC_DECLARE_TOKEN_DROPOUT(avx512_bf16)
#undef LRC_DECLARE_TOKEN_DROPOUT

}  // namespace lrc::cpu
