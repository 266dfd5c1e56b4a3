// SPDX-License-Identifier: Apache-2.0
// The C++ API of csrc/include/lrc over the emulation, as C functions for ctypes. Each returns null, or the message of
// the exception that it threw.
#include "cuda_emulation.h"
#include "lrc/attention.h"
#include "lrc/philox.h"
#include "lrc/token_dropout.h"
#include "lrc/tome.h"

extern "C" {
void check_block_sum(const float*, float*, int, int, int);
void check_reverse(const float*, float*, int, int, int);
void check_warp_features(const int*, int*, unsigned*, int*, int*, int, int);
void check_deadlock(float*);
void check_positions(void*, const int64_t*);
void check_round_trip(const float*, float*, int, int);
void check_matrix_product(const void*, const void*, float*, int, int);
void check_cluster_sum(const int*, int*, int*, int, int, int);
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
const char* host_matrix_product(const void* a, const void* b, float* d, int bf16, int wait) {
  return guarded([&] { check_matrix_product(a, b, d, bf16, wait); });
}
const char* host_cluster_sum(const int* x, int* scratch, int* out, int blocks, int cluster, int synchronise) {
  return guarded([&] { check_cluster_sum(x, scratch, out, blocks, cluster, synchronise); });
}

const char* host_head_mean(const void* x, int dtype, const int64_t* rows, int64_t num_tokens, int64_t num_heads,
                           float* metric) {
  return guarded([&] {
    lrc::head_mean(x, static_cast<lrc::DType>(dtype), rows_of(rows), num_tokens, num_heads, metric, nullptr);
  });
}
const char* host_gather_rows(const void* y, int dtype, const int32_t* assign, const float* size, const float* weight,
                             const uint32_t* first_token, const int64_t* rows, int64_t num_tokens, void* x) {
  return guarded([&] {
    lrc::gather_rows(y, static_cast<lrc::DType>(dtype), assign, size, weight, first_token, rows_of(rows), num_tokens, x,
                     nullptr);
  });
}
const char* host_first_tokens(const void* x, int dtype, const int64_t* rows, int64_t num_tokens, const void* y,
                              int64_t num_out, const int32_t* assign, const float* weight, uint32_t* first_token) {
  return guarded([&] {
    lrc::first_tokens(x, static_cast<lrc::DType>(dtype), rows_of(rows), num_tokens, y, num_out, assign, weight,
                      first_token, nullptr);
  });
}
const char* host_plan_merge(const float* metric, int64_t num_tokens, int64_t num_channels, const int32_t* cu_in,
                            const int32_t* cu_out, int64_t num_segments, int64_t max_seqlen, const int32_t* r,
                            int64_t num_iterations, const float* size, const uint8_t* is_protected,
                            const uint8_t* destination, const float* threshold, int64_t bf16, int64_t position_order,
                            int64_t isolate, int64_t team, int32_t* assign, float* weight, float* size_out,
                            int32_t* anchor, uint8_t* valid) {
  return guarded([&] {
    const int64_t bytes = lrc::plan_workspace_bytes(num_tokens, num_channels);
    // 0xFF: NaN and -1 where nobody wrote.
    std::vector<unsigned char> memory(bytes + 256, 0xFF);
    void* const workspace = memory.data() + (256 - reinterpret_cast<uintptr_t>(memory.data()) % 256) % 256;
    lrc::plan_merge({metric,
                     num_tokens,
                     num_channels,
                     cu_in,
                     cu_out,
                     num_segments,
                     max_seqlen,
                     r,
                     num_iterations,
                     size,
                     is_protected,
                     destination,
                     threshold != nullptr,
                     threshold ? *threshold : 0.0f,
                     bf16 != 0,
                     position_order != 0,
                     isolate != 0,
                     team,
                     workspace,
                     bytes,
                     assign,
                     weight,
                     size_out,
                     anchor,
                     valid},
                    nullptr);
  });
}
const char* host_merge_rows(const void* x, int dtype, const int64_t* rows, int64_t num_tokens, const int32_t* assign,
                            const float* size, const float* weight, const int32_t* cu_in, const int32_t* cu_out,
                            int64_t num_segments, int64_t num_out, int reduction, void* y) {
  return guarded([&] {
    lrc::merge_rows({x, static_cast<lrc::DType>(dtype), rows_of(rows), num_tokens, assign, size, weight, cu_in, cu_out,
                     num_segments, num_out, static_cast<lrc::Reduction>(reduction), y},
                    nullptr);
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
const char* host_philox(const int64_t* counter, const int64_t* key, int64_t* out) {
  return guarded([&] {
    lrc::PhiloxWords words;
    for (int i = 0; i < 4; ++i) words.word[i] = static_cast<uint32_t>(counter[i]);
    words = lrc::philox_4x32(words, static_cast<uint32_t>(key[0]), static_cast<uint32_t>(key[1]));
    for (int i = 0; i < 4; ++i) out[i] = words.word[i];
  });
}
const char* host_move_rows(const int64_t* moves, int64_t count, const int32_t* index, int64_t num_rows) {
  return guarded([&] {
    lrc::RowMove table[lrc::kMaxRowMoves + 1] = {};
    for (int64_t i = 0; i < count && i <= lrc::kMaxRowMoves; ++i) {
      const int64_t* v = moves + 7 * i;
      table[i] = {reinterpret_cast<void*>(v[0]), reinterpret_cast<void*>(v[1]), v[2], v[3], v[4], v[5],
                  static_cast<uint64_t>(v[6])};
    }
    lrc::move_rows(table, count, index, num_rows, nullptr);
  });
}
const char* host_drop_tokens_rmsnorm(const void* residual, int dtype, int64_t row_stride, const void* weight,
                                     const float* eps, const int32_t* indices, int64_t num_rows, int64_t width,
                                     void* dropped, void* normed, float* rstd) {
  return guarded([&] {
    lrc::drop_tokens_rmsnorm(residual, static_cast<lrc::DType>(dtype), row_stride, weight, *eps, indices, num_rows,
                             width, dropped, normed, rstd, nullptr);
  });
}
const char* host_select_tokens(int64_t mode, const uint8_t* droppable, const int32_t* cu_in, const int32_t* cu_out,
                               const int32_t* keep, const float* scores, const int64_t* seed, int64_t layer,
                               const int64_t* sequence_ids, const void* positions, int64_t positions_are_64_bit,
                               int64_t num_sequences, int64_t max_seqlen, int32_t* indices, int32_t* inverse) {
  return guarded([&] {
    lrc::select_tokens(
        {static_cast<lrc::SelectMode>(mode), droppable, cu_in, cu_out, keep, scores, seed, static_cast<uint32_t>(layer),
         sequence_ids, positions, positions_are_64_bit != 0, num_sequences, max_seqlen, indices, inverse},
        nullptr);
  });
}
}
