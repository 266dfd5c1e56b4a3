// SPDX-License-Identifier: Apache-2.0
// The C++ API of csrc/include/lrc over the emulation, as C functions for ctypes. Each returns null, or the message of
// the exception that it threw.
#include "cuda_emulation.h"
#include "lrc/attention.h"
#include "lrc/tome.h"

extern "C" {
void check_block_sum(const float*, float*, int, int, int);
void check_reverse(const float*, float*, int, int, int);
void check_warp_features(const int*, int*, unsigned*, int*, int*, int, int);
void check_deadlock(float*);
void check_positions(void*, const int64_t*);
void check_round_trip(const float*, float*, int, int);
}

namespace {

template <typename Body>
const char* guarded(Body&& body) {
  static std::string message;
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

lrc::TokenRows rows_of(const int64_t* v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]};
}

}  // namespace

extern "C" {

void host_reverse_order(int on) {
  emulation::reverse_order = on != 0;
}

const char* host_block_sum(const float* x, float* out, int blocks, int threads, int n) {
  return guarded([&] { check_block_sum(x, out, blocks, threads, n); });
}
const char* host_reverse(const float* x, float* out, int blocks, int threads, int synchronise) {
  return guarded([&] { check_reverse(x, out, blocks, threads, synchronise); });
}
const char* host_warp_features(const int* x, int* scan, unsigned* ballot, int* count, int* histogram, int threads,
                               int bins) {
  return guarded([&] { check_warp_features(x, scan, ballot, count, histogram, threads, bins); });
}
const char* host_deadlock(float* out) {
  return guarded([&] { check_deadlock(out); });
}
const char* host_positions(void* out, const int64_t* sizes) {
  return guarded([&] { check_positions(out, sizes); });
}
const char* host_round_trip(const float* x, float* out, int n, int dtype) {
  return guarded([&] { check_round_trip(x, out, n, dtype); });
}

const char* host_head_mean(const void* x, int dtype, const int64_t* rows, int64_t num_tokens, int64_t num_heads,
                           float* metric) {
  return guarded([&] {
    lrc::head_mean(x, static_cast<lrc::DType>(dtype), rows_of(rows), num_tokens, num_heads, metric, nullptr);
  });
}
const char* host_gather_rows(const void* y, int dtype, const int32_t* assign, const float* size, const float* weight,
                             const int64_t* rows, int64_t num_tokens, void* x) {
  return guarded([&] {
    lrc::gather_rows(y, static_cast<lrc::DType>(dtype), assign, size, weight, rows_of(rows), num_tokens, x, nullptr);
  });
}

// A partial: dtype, row and head stride of out, head and row stride of lse.
const char* host_merge_partials(const void* out, const float* lse, const int64_t* layout, const void* out_block,
                                const float* lse_block, const int64_t* layout_block, int64_t num_rows,
                                int64_t num_heads, int64_t num_channels, float* merged, float* merged_lse) {
  return guarded([&] {
    const auto partial = [](const void* values, const float* logs, const int64_t* v) {
      return lrc::PartialAttention{values, static_cast<lrc::DType>(v[0]), v[1], v[2], logs, v[3], v[4]};
    };
    lrc::merge_partials(partial(out, lse, layout), partial(out_block, lse_block, layout_block), num_rows, num_heads,
                        num_channels, merged, merged_lse, nullptr);
  });
}
}
