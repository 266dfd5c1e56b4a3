// SPDX-License-Identifier: Apache-2.0
// The host side of the attention scores: picks the instruction set, checks sizes and indices, and cuts the work into
// spans whose scratch stays within kScratchFloats.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/token_dropout.h"

namespace lrc::cpu {
namespace {

constexpr int64_t kScratchFloats = int64_t{5} << 18;
// Queries that the kernel may read, and ignore, past the last one.
constexpr int64_t kSpareQueries = 8;

const TokenDropoutKernels& kernels() {
#ifdef LRC_X86
  if (active_isa() == Isa::kAvx512Bf16) return avx512_bf16::kTokenDropoutKernels;
  if (active_isa() == Isa::kAvx512) return avx512::kTokenDropoutKernels;
  if (active_isa() == Isa::kAvx2) return avx2::kTokenDropoutKernels;
#endif
  return baseline::kTokenDropoutKernels;
}

int64_t blocks_of(int64_t num_keys, int64_t block_size) {
  return (num_keys + block_size - 1) / block_size;
}

void check_block_table(const ScoreArgs& args) {
  const ScoreKeys& keys = args.keys;
  require(keys.block_size >= 1, "block_size must be >= 1, got " + std::to_string(keys.block_size));
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t needed = blocks_of(args.cu_seqlens[s + 1] - args.cu_seqlens[s], keys.block_size);
    require(needed <= keys.max_blocks, "block_table must have " + std::to_string(needed) + " columns for sequence " +
                                           std::to_string(s) + ", got " + std::to_string(keys.max_blocks));
    for (int64_t b = 0; b < needed; ++b) {
      const int32_t block = keys.block_table[s * keys.max_blocks + b];
      require(block >= 0 && block < keys.num_blocks, "block_table must lie in [0, " + std::to_string(keys.num_blocks) +
                                                         "), got " + std::to_string(block) + " for sequence " +
                                                         std::to_string(s));
    }
  }
}

void check(const ScoreArgs& args) {
  check_dtype(args.keys.dtype);
  check_threads(args.threads);
  require(args.keys.head_dim >= 1 && args.num_rows >= 0, "head_dim must be >= 1 and num_rows >= 0");
  require(args.keys.num_kv_heads >= 1 && args.num_heads >= 1 && args.num_heads % args.keys.num_kv_heads == 0,
          "num_heads must be a multiple of num_kv_heads, got " + std::to_string(args.num_heads) + " and " +
              std::to_string(args.keys.num_kv_heads));
  check_cu_seqlens("cu_seqlens", args.cu_seqlens, args.num_sequences, args.num_scores);
  if (args.keys.block_table != nullptr) {
    check_block_table(args);
  } else {
    require(args.num_scores <= args.keys.num_tokens,
            "k must hold " + std::to_string(args.num_scores) + " tokens, got " + std::to_string(args.keys.num_tokens));
  }
  if (args.statistics != nullptr || args.factor != nullptr) {
    require(args.num_rows == args.num_sequences && args.lse == nullptr, "blocks must have one row each, and no lse");
    for (int64_t s = 0; s < args.num_sequences; ++s) {
      require(args.cu_seqlens[s + 1] - args.cu_seqlens[s] <= kScoreBlock,
              "blocks must have at most " + std::to_string(kScoreBlock) + " keys");
    }
  }
  for (int64_t r = 0; r < args.num_rows; ++r) {
    require(args.row_sequence[r] >= -1 && args.row_sequence[r] < args.num_sequences,
            "row_sequence must lie in [-1, " + std::to_string(args.num_sequences) + "), got " +
                std::to_string(args.row_sequence[r]));
  }
}

// Spans that run together, and the memory that they point into.
class Wave {
 public:
  Wave(const ScoreArgs& args) : args_(args), kernels_(kernels()) {}

  // Floats of scratch beside q and `reduced` that a span of this many vectors needs.
  static int64_t scratch_of(int64_t num_keys, int64_t vectors) {
    return blocks_of(num_keys, kScoreBlock) * vectors * (kScoreBlock + 2);
  }

  void add(ScoreSpan span, int64_t vectors) {
    const int64_t num_blocks = blocks_of(span.num_keys, kScoreBlock), step = kernels_.step;
    const int64_t needed = scratch_of(span.num_keys, vectors);
    if (!spans_.empty() && used_ + needed > kScratchFloats) run();
    const int64_t q_floats = (vectors + kSpareQueries) * blocks_of(args_.keys.head_dim, step) * step;
    // Not value-initialised: everything that is read has been written or is masked.
    float* memory = memory_.emplace_back(new float[needed + q_floats]).get();
    span.p = memory;
    span.maximum = span.p + num_blocks * vectors * kScoreBlock;
    span.sum = span.maximum + num_blocks * vectors;
    span.q = span.sum + num_blocks * vectors;
    span.first_task = num_tasks_;
    spans_.push_back(span);
    num_tasks_ += num_blocks;
    used_ += needed;
  }

  void run() {
    if (!spans_.empty()) kernels_.scores(args_, spans_.data(), static_cast<int64_t>(spans_.size()));
    spans_.clear();
    memory_.clear();
    num_tasks_ = used_ = 0;
  }

 private:
  const ScoreArgs& args_;
  const TokenDropoutKernels& kernels_;
  std::vector<ScoreSpan> spans_;
  std::vector<std::unique_ptr<float[]>> memory_;
  int64_t num_tasks_ = 0, used_ = 0;
};

// The rows of one sequence, cut by rows, then by kv heads, where not all of them fit at once. Rows and heads are added
// in ascending order however they are cut.
void add_sequence(const ScoreArgs& args, int64_t sequence, const std::vector<int64_t>& row,
                  const std::vector<int64_t>& visible, Wave& wave) {
  const int64_t kv_heads = args.keys.num_kv_heads, group = args.num_heads / kv_heads;
  const int64_t longest = *std::max_element(visible.begin(), visible.end());
  const int64_t num_rows = static_cast<int64_t>(row.size());
  const auto fitting = [&](int64_t vectors, int64_t wanted) {
    return std::clamp<int64_t>(kScratchFloats / Wave::scratch_of(longest, vectors), 1, wanted);
  };
  const int64_t row_step = fitting(group, num_rows), head_step = fitting(group * row_step, kv_heads);
  const bool is_whole = row_step == num_rows && head_step == kv_heads;
  if (!is_whole) wave.run();
  std::unique_ptr<float[]> reduced;
  if (head_step < kv_heads) reduced.reset(new float[row_step * blocks_of(longest, kScoreBlock) * 2 * kScoreBlock]);
  for (int64_t r = 0; r < num_rows; r += row_step) {
    for (int64_t h = 0; h < kv_heads; h += head_step) {
      ScoreSpan span = {};
      span.sequence = sequence;
      span.num_keys = longest;
      span.first_kv_head = h;
      span.num_kv_heads = std::min(head_step, kv_heads - h);
      span.num_rows = std::min(row_step, num_rows - r);
      span.row = row.data() + r;
      span.visible = visible.data() + r;
      span.row_scale = args.head_scale / static_cast<float>(num_rows);
      span.reduced = reduced.get();
      span.first_heads = h == 0;
      span.last_heads = h + head_step >= kv_heads;
      wave.add(span, span.num_kv_heads * group * span.num_rows);
      if (!is_whole) wave.run();
    }
  }
}

}  // namespace

void attention_scores(const ScoreArgs& args) {
  check(args);
  std::fill_n(args.scores, args.num_scores, 0.f);
  std::vector<std::vector<int64_t>> row(args.num_sequences), visible(args.num_sequences);
  for (int64_t r = 0; r < args.num_rows; ++r) {
    const int64_t s = args.row_sequence[r];
    if (s < 0) continue;
    const int64_t length = args.cu_seqlens[s + 1] - args.cu_seqlens[s];
    row[s].push_back(r);
    visible[s].push_back(std::clamp<int64_t>(int64_t{args.row_position[r]} + 1, 0, length));
  }
  Wave wave(args);
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    if (!row[s].empty() && *std::max_element(visible[s].begin(), visible[s].end()) > 0) {
      add_sequence(args, s, row[s], visible[s], wave);
    }
  }
  wave.run();
}

void attention_score_factors(const FactorArgs& args) {
  require(args.num_sequences >= 0 && args.num_heads >= 1 && args.num_blocks >= 0, "num_heads must be >= 1");
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    require(args.seen[s] >= 0 && args.seen[s] <= args.num_blocks,
            "seen must lie in [0, " + std::to_string(args.num_blocks) + "], got " + std::to_string(args.seen[s]));
  }
  kernels().factors(args);
}

}  // namespace lrc::cpu
