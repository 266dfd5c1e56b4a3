// SPDX-License-Identifier: Apache-2.0
// The host side of the CPU kernels: picks the instruction set, checks sizes and indices, allocates, ranks.
#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cpu/check.h"
#include "cpu/isa.h"
#include "cpu/tome.h"

namespace lrc::cpu {
namespace {

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
  for (const Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2}) {
    if (isa_supported(isa)) return isa;
  }
  return Isa::kBaseline;
}

std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

const TomeKernels& tome_kernels() {
#ifdef LRC_X86
  if (active_isa() >= Isa::kAvx512) return avx512::kTomeKernels;
  if (active_isa() == Isa::kAvx2) return avx2::kTomeKernels;
#endif
  return baseline::kTomeKernels;
}

void check_rows(const TokenRows& rows, int64_t num_tokens) {
  require(rows.width >= 0 && rows.shuffle >= 1 && rows.prefix >= 0, "width and prefix must be >= 0, shuffle >= 1");
  require(num_tokens >= 0 && (num_tokens == 0 || (rows.tokens_per_frame > 0 && rows.grid_width > 0)),
          "num_tokens must be >= 0 and frames not empty, got " + std::to_string(num_tokens) + " tokens");
}

void check_assign(const int32_t* assign, int64_t num_tokens, int64_t num_out) {
  for (int64_t i = 0; i < num_tokens; ++i) {
    require(assign[i] >= 0 && assign[i] < num_out, "assign must lie in [0, " + std::to_string(num_out) + "), got " +
                                                       std::to_string(assign[i]) + " for token " + std::to_string(i));
  }
}

void check_num_heads(const TokenRows& rows, int64_t num_heads) {
  const int64_t width = rows.width * rows.shuffle * rows.shuffle;
  require(num_heads >= 1 && width % num_heads == 0,
          "num_heads must divide the token width " + std::to_string(width) + ", got " + std::to_string(num_heads));
}

// Returns the length of the longest segment.
int64_t check_plan(const PlanArgs& args) {
  check_threads(args.threads);
  require(args.num_segments >= 0 && args.num_tokens <= INT32_MAX && args.num_out <= INT32_MAX,
          "a plan holds fewer than 2^31 tokens, got " + std::to_string(args.num_tokens));
  const int64_t longest = check_cu_seqlens("cu_seqlens_in", args.cu_seqlens_in, args.num_segments, args.num_tokens);
  check_cu_seqlens("cu_seqlens_out", args.cu_seqlens_out, args.num_segments, args.num_out);
  for (int64_t i = 0; i < args.num_iterations * args.num_segments; ++i) {
    require(args.r[i] >= 0, "r must be >= 0, got " + std::to_string(args.r[i]));
  }
  return longest;
}

void check_room(int64_t failed_segment) {
  require(failed_segment < 0, "cu_seqlens_out must leave room for the rows that r keeps, but does not in segment " +
                                  std::to_string(failed_segment));
}

// One block of `stride` bytes per worker that plans segments of its own, not initialised: pages that no row needs are
// never touched.
struct Workspaces {
  Workspaces(int64_t stride, const PlanArgs& args) {
    constexpr int64_t kAlignment = 64;
    const int64_t blocks = args.num_segments < args.threads ? 1 : args.threads;
    memory.reset(new char[stride * blocks + kAlignment]);
    aligned =
        memory.get() + (kAlignment - static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.get()) % kAlignment));
  }

  std::unique_ptr<char[]> memory;
  char* aligned;
};

struct Groups {
  Groups(const int32_t* assign, const float* weight, int64_t num_tokens, int64_t num_out, int threads)
      : start(num_out + 2), member(num_tokens), scratch(new float[kMergeColumns * threads]) {
    group_tokens(assign, weight, num_tokens, 0, num_out, start.data(), member.data());
  }

  std::vector<int64_t> start, member;
  std::unique_ptr<float[]> scratch;
};

}  // namespace

bool isa_supported(Isa isa) {
  if (isa == Isa::kBaseline) return true;
#ifdef LRC_X86
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  if (isa == Isa::kAvx2) return v3;
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 && (isa == Isa::kAvx512 || __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

Isa active_isa() {
  return current_isa().load(std::memory_order_relaxed);
}

const char* isa_name(Isa isa) {
  return kIsaNames[static_cast<int>(isa)];
}

void set_isa(const char* name) {
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::string(name) != isa_name(isa)) continue;
    require(isa_supported(isa), "isa must be one that this machine and build support, got " + std::string(name));
    current_isa().store(isa, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("isa must be baseline, avx2, avx512 or avx512_bf16, got " + std::string(name));
}

void rank_rows(const float* score, const uint8_t* is_protected, int32_t* order, int64_t n) {
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order, order + n, [=](int32_t a, int32_t b) {
    return is_protected[a] != is_protected[b] ? is_protected[a] < is_protected[b] : score[a] > score[b];
  });
}

void group_tokens(const int32_t* assign, const float* weight, int64_t num_tokens, int32_t first_row, int64_t num_rows,
                  int64_t* group_start, int64_t* member) {
  const auto masked = [=](int64_t i) { return weight != nullptr && weight[i] == 0.f; };
  std::fill(group_start, group_start + num_rows + 2, 0);
  // Row j is counted at j + 2; then j + 1 is where it starts, and once it is filled, where it ends.
  for (int64_t i = 0; i < num_tokens; ++i) group_start[assign[i] - first_row + 2] += !masked(i);
  for (int64_t j = 2; j < num_rows + 2; ++j) group_start[j] += group_start[j - 1];
  for (int64_t i = 0; i < num_tokens; ++i) {
    if (!masked(i)) member[group_start[assign[i] - first_row + 1]++] = i;
  }
}

void tome_head_mean(const HeadMeanArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_threads(args.threads);
  check_num_heads(args.rows, args.num_heads);
  if (args.rows.width > 0) tome_kernels().head_mean(args);
}

void tome_plan(const PlanArgs& args) {
  const int64_t longest = check_plan(args);
  const TomeKernels& kernels = tome_kernels();
  const int64_t stride = kernels.plan_workspace_bytes(longest, args.num_channels);
  const Workspaces memory(stride, args);
  check_room(kernels.plan(args, memory.aligned, stride));
}

void tome_compress(const CompressArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.plan.num_tokens);
  check_num_heads(args.rows, args.num_heads);
  const int64_t longest = check_plan(args.plan);
  for (int64_t s = 0; s <= args.plan.num_segments && args.plan.num_tokens > 0; ++s) {
    require(args.plan.cu_seqlens_in[s] % args.rows.tokens_per_frame == 0,
            "cu_seqlens_in must cut between frames of " + std::to_string(args.rows.tokens_per_frame) + " tokens, got " +
                std::to_string(args.plan.cu_seqlens_in[s]));
  }
  const TomeKernels& kernels = tome_kernels();
  const int64_t stride = kernels.compress_workspace_bytes(args, longest);
  const Workspaces memory(stride, args.plan);
  check_room(kernels.compress(args, memory.aligned, stride));
}

void tome_max_backward(const MaxBackwardArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_rows(args.dx_rows, args.num_tokens);
  check_threads(args.threads);
  check_assign(args.assign, args.num_tokens, args.num_out);
  const Groups groups(args.assign, args.weight, args.num_tokens, args.num_out, args.threads);
  tome_kernels().max_backward(args, groups.start.data(), groups.member.data(), groups.scratch.get());
}

void tome_merge(const MergeArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_threads(args.threads);
  check_assign(args.assign, args.num_tokens, args.num_out);
  require(args.size != nullptr || args.reduction == Reduction::kSum || args.num_out == 0,
          "size must be given where the reduction is no sum");
  const Groups groups(args.assign, args.weight, args.num_tokens, args.num_out, args.threads);
  tome_kernels().merge(args, groups.start.data(), groups.member.data(), groups.scratch.get());
}

void tome_gather(const GatherArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_threads(args.threads);
  check_assign(args.assign, args.num_tokens, args.num_rows);
  tome_kernels().gather(args);
}

}  // namespace lrc::cpu
