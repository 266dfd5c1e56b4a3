// SPDX-License-Identifier: Apache-2.0
// Token merging on the CPU: raw pointers, sizes and strides (in elements) in, results written in place, nothing out.
// Every function throws std::invalid_argument before it writes anything when its integers do not fit each other.
#pragma once

#include <cstdint>

#include "lrc/token_rows.h"

namespace lrc::cpu {

struct HeadMeanArgs {
  const void* x;
  DType dtype;
  TokenRows rows;
  int64_t num_tokens;
  int64_t num_heads;
  float* metric;  // [num_tokens, K]
  int threads;
};

struct PlanArgs {
  const float* metric;  // [num_tokens, num_channels]
  int64_t num_tokens;
  int64_t num_channels;
  const int64_t* cu_seqlens_in;   // [num_segments + 1]
  const int64_t* cu_seqlens_out;  // [num_segments + 1]
  int64_t num_segments;
  const int32_t* r;  // [num_iterations, num_segments]
  int64_t num_iterations;
  const float* size;            // [num_tokens] or null: ones
  const uint8_t* is_protected;  // [num_tokens] or null: none
  const uint8_t* destination;   // [num_tokens] or null: the odd tokens
  int64_t num_out;
  bool has_threshold;
  float threshold;
  bool position_order;
  bool round_to_bf16;  // metric, lengths, unit rows and scores
  bool isolate;        // rows without direction match nothing; else every score that they take part in is NaN
  int32_t* assign;     // [num_tokens]
  float* size_out;     // [num_out], zeros
  float* weight;       // [num_tokens]
  int32_t* anchor;     // [num_out], zeros
  uint8_t* valid;      // [num_out], zeros; null: not wanted
  int threads;
};

struct MergeArgs {
  const void* x;
  DType dtype;
  TokenRows rows;
  int64_t num_tokens;
  const int32_t* assign;  // [num_tokens]
  const float* size;      // [num_out]: a row of size 0 is 0, the mean divides by it; null only for the sum
  const float* weight;    // [num_tokens] or null: ones; 0 masks
  Reduction reduction;
  int64_t num_out;
  void* y;  // [num_out, shuffle^2 * width]
  int threads;
};

// Head mean, plan and mean of the segments of `plan`, one after the other, so that the features of a segment still lie
// in cache when they are merged. plan.metric is not read.
struct CompressArgs {
  const void* x;
  DType dtype;
  TokenRows rows;
  int64_t num_heads;
  PlanArgs plan;  // its threads are those of the whole
  void* y;        // [num_out, shuffle^2 * width]
};

// x of each row's first token that attains y gets the row's gradient.
struct MaxBackwardArgs {
  const void* grad;  // [num_out, shuffle^2 * width]
  const void* x;
  DType dtype;
  TokenRows rows;
  int64_t num_tokens;
  const void* y;          // [num_out, shuffle^2 * width]
  const int32_t* assign;  // [num_tokens]
  const float* weight;    // [num_tokens] or null: ones; 0 masks
  int64_t num_out;
  void* dx;  // zeros
  TokenRows dx_rows;
  int threads;
};

struct GatherArgs {
  const void* y;  // [num_rows, shuffle^2 * width]
  DType dtype;
  int64_t num_rows;
  const int32_t* assign;  // [num_tokens]
  const float* size;      // [num_rows] or null
  const float* weight;    // [num_tokens] or null
  TokenRows rows;
  int64_t num_tokens;
  void* x;
  int threads;
};

void tome_head_mean(const HeadMeanArgs& args);
void tome_plan(const PlanArgs& args);
void tome_merge(const MergeArgs& args);
void tome_gather(const GatherArgs& args);
void tome_compress(const CompressArgs& args);
void tome_max_backward(const MaxBackwardArgs& args);

// What one instruction set provides; the functions above check, allocate and call these.
struct TomeKernels {
  void (*head_mean)(const HeadMeanArgs& args);
  int64_t (*plan_workspace_bytes)(int64_t max_seqlen, int64_t num_channels);
  // workspace: one block of `stride` bytes per worker, 64-byte aligned.
  // Returns the first segment whose rows do not fit cu_seqlens_out, or -1.
  int64_t (*plan)(const PlanArgs& args, char* workspace, int64_t stride);
  // group_start, member: as group_tokens leaves them. scratch: kMergeColumns floats per worker.
  void (*merge)(const MergeArgs& args, const int64_t* group_start, const int64_t* member, float* scratch);
  void (*gather)(const GatherArgs& args);
  int64_t (*compress_workspace_bytes)(const CompressArgs& args, int64_t max_seqlen);
  // As plan.
  int64_t (*compress)(const CompressArgs& args, char* workspace, int64_t stride);
  void (*max_backward)(const MaxBackwardArgs& args, const int64_t* group_start, const int64_t* member, float* scratch);
};

constexpr int64_t kMergeColumns = 2048;

// order = the n rows by (protected last, descending score), stable. Compiled once, for the baseline: the standard
// library must not be instantiated in the files of an instruction set, whose copies the linker may pick for everyone.
void rank_rows(const float* score, const uint8_t* is_protected, int32_t* order, int64_t n);

// member: the tokens of weight other than 0 by output row, ascending within a row; those of row first_row + j lie in
// [group_start[j], group_start[j + 1]). group_start has room for num_rows + 2 numbers. Compiled once, like rank_rows.
void group_tokens(const int32_t* assign, const float* weight, int64_t num_tokens, int32_t first_row, int64_t num_rows,
                  int64_t* group_start, int64_t* member);

#define LRC_DECLARE_TOME(isa)            \
  namespace isa {                        \
  extern const TomeKernels kTomeKernels; \
  }
LRC_DECLARE_TOME(baseline)
LRC_DECLARE_TOME(avx2)
LRC_DECLARE_TOME(avx512)
#undef LRC_DECLARE_TOME

}  // namespace lrc::cpu
