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

void tome_head_mean(const HeadMeanArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_threads(args.threads);
  const int64_t width = args.rows.width * args.rows.shuffle * args.rows.shuffle;
  require(args.num_heads >= 1 && width % args.num_heads == 0,
          "num_heads must divide the token width " + std::to_string(width) + ", got " + std::to_string(args.num_heads));
  if (width > 0) tome_kernels().head_mean(args);
}

void tome_plan(const PlanArgs& args) {
  check_threads(args.threads);
  require(args.num_segments >= 0 && args.num_tokens <= INT32_MAX && args.num_out <= INT32_MAX,
          "a plan holds fewer than 2^31 tokens, got " + std::to_string(args.num_tokens));
  const int64_t longest = check_cu_seqlens("cu_seqlens_in", args.cu_seqlens_in, args.num_segments, args.num_tokens);
  check_cu_seqlens("cu_seqlens_out", args.cu_seqlens_out, args.num_segments, args.num_out);
  for (int64_t i = 0; i < args.num_iterations * args.num_segments; ++i) {
    require(args.r[i] >= 0, "r must be >= 0, got " + std::to_string(args.r[i]));
  }
  const TomeKernels& kernels = tome_kernels();
  constexpr int64_t kAlignment = 64;
  const int64_t stride = kernels.plan_workspace_bytes(longest, args.num_channels);
  const int64_t workers = std::min<int64_t>(args.threads, std::max<int64_t>(args.num_segments, 1));
  const int64_t blocks = args.num_segments < args.threads ? 1 : workers;
  // Not value-initialised: pages that no row needs are never touched.
  const std::unique_ptr<char[]> memory(new char[stride * blocks + kAlignment]);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory.get()) % kAlignment);
  const int64_t failed = kernels.plan(args, memory.get() + (kAlignment - misaligned), stride);
  require(failed < 0, "cu_seqlens_out must leave room for the rows that r keeps, but does not in segment " +
                          std::to_string(failed));
}

void tome_merge(const MergeArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_threads(args.threads);
  check_assign(args.assign, args.num_tokens, args.num_out);
  std::vector<int64_t> group_start(args.num_out + 1, 0), member(args.num_tokens);
  const auto unmasked = [&](int64_t i) { return args.weight == nullptr || args.weight[i] != 0.f; };
  for (int64_t i = 0; i < args.num_tokens; ++i) group_start[args.assign[i] + 1] += unmasked(i);
  for (int64_t j = 0; j < args.num_out; ++j) group_start[j + 1] += group_start[j];
  std::vector<int64_t> filled(group_start.begin(), group_start.end() - 1);
  for (int64_t i = 0; i < args.num_tokens; ++i) {
    if (unmasked(i)) member[filled[args.assign[i]]++] = i;
  }
  const std::unique_ptr<float[]> scratch(new float[kMergeColumns * args.threads]);
  tome_kernels().merge(args, group_start.data(), member.data(), scratch.get());
}

void tome_gather(const GatherArgs& args) {
  check_dtype(args.dtype);
  check_rows(args.rows, args.num_tokens);
  check_threads(args.threads);
  check_assign(args.assign, args.num_tokens, args.num_rows);
  tome_kernels().gather(args);
}

}  // namespace lrc::cpu
