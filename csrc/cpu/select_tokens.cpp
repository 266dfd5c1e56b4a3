// SPDX-License-Identifier: Apache-2.0
// Selection of tokens on the CPU. A token's rank is its key and its row in one 64-bit number, so that no two are equal,
// and the k-th smallest of them (std::nth_element) parts the kept from the dropped without sorting either.
#include "cpu/select_tokens.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "lrc/token_key.h"

namespace lrc::cpu {
namespace {

uint32_t word_of(const RandomArgs& random, int64_t sequence, int64_t start, int64_t t) {
  const int64_t position = random.positions ? random.positions[start + t] : t;
  const int64_t id = random.sequence_ids ? random.sequence_ids[sequence] : sequence;
  return token_word(static_cast<uint64_t>(random.seed), static_cast<uint32_t>(position), random.layer,
                    static_cast<uint64_t>(id));
}

uint32_t key_of(const SelectArgs& args, int64_t sequence, int64_t start, int64_t t) {
  if (args.mode == SelectMode::kRandom) return word_of(args.random, sequence, start, t);
  uint32_t bits;
  std::memcpy(&bits, args.scores + start + t, sizeof(bits));
  return ~score_key(bits);
}

/// Marks the kept tokens of one sequence with 1 in `inverse`, the others with 0.
void mark_sequence(const SelectArgs& args, int64_t sequence) {
  const int64_t start = args.cu_seqlens_in[sequence];
  const int64_t n = args.cu_seqlens_in[sequence + 1] - start;
  const uint8_t* const droppable = args.droppable + start;
  int32_t* const marks = args.inverse + start;
  std::vector<uint64_t> ranks;
  ranks.reserve(static_cast<size_t>(n));
  const bool linspace = args.mode == SelectMode::kLinspace;
  for (int64_t t = 0; t < n; ++t) {
    marks[t] = !droppable[t];
    if (!droppable[t]) continue;
    const uint64_t key = linspace ? 0 : key_of(args, sequence, start, t);
    ranks.push_back(key << 32 | static_cast<uint64_t>(t));
  }
  const int64_t total = static_cast<int64_t>(ranks.size());
  const int64_t keep = std::min<int64_t>(args.keep[sequence], total);
  if (linspace) {
    for (int64_t i = 0; i < keep; ++i) marks[ranks[keep > 1 ? i * (total - 1) / (keep - 1) : 0]] = 1;
    return;
  }
  if (keep < total) std::nth_element(ranks.begin(), ranks.begin() + keep, ranks.end());
  for (int64_t i = 0; i < keep; ++i) marks[ranks[i] & 0xFFFFFFFFu] = 1;
}

}  // namespace

void select_tokens(const SelectArgs& args) {
#pragma omp parallel for schedule(dynamic) num_threads(args.threads) if (args.threads > 1)
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    mark_sequence(args, s);
    int32_t row = args.cu_seqlens_out[s];
    for (int64_t t = args.cu_seqlens_in[s]; t < args.cu_seqlens_in[s + 1]; ++t) {
      const bool kept = args.inverse[t] && row < args.cu_seqlens_out[s + 1];
      if (kept) args.indices[row] = static_cast<int32_t>(t);
      args.inverse[t] = kept ? row++ : -1;
    }
  }
}

void select_tokens_bernoulli(const BernoulliArgs& args) {
  const int64_t num_tokens = args.cu_seqlens[args.num_sequences];
#pragma omp parallel for schedule(dynamic) num_threads(args.threads) if (args.threads > 1)
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    const int64_t start = args.cu_seqlens[s];
    for (int64_t t = start; t < args.cu_seqlens[s + 1]; ++t) {
      args.inverse[t] = args.droppable[t] ? word_of(args.random, s, start, t - start) < args.threshold : 2;
    }
  }
  int64_t fixed = 0, wanted = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    fixed += args.inverse[t] == 2;
    wanted += args.inverse[t] == 1;
  }
  *args.num_wanted = static_cast<int32_t>(fixed + wanted);
  int64_t room = args.capacity - fixed, row = 0;
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    args.cu_seqlens_out[s] = static_cast<int32_t>(row);
    for (int64_t t = args.cu_seqlens[s]; t < args.cu_seqlens[s + 1]; ++t) {
      const int32_t mark = args.inverse[t];
      const bool kept = row < args.capacity && (mark == 2 || (mark == 1 && room-- > 0));
      if (kept) args.indices[row] = static_cast<int32_t>(t);
      args.inverse[t] = kept ? static_cast<int32_t>(row++) : -1;
    }
  }
  args.cu_seqlens_out[args.num_sequences] = static_cast<int32_t>(row);
  args.cu_seqlens_out[args.num_sequences + 1] = static_cast<int32_t>(args.capacity);
}

}  // namespace lrc::cpu
