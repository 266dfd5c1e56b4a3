// SPDX-License-Identifier: Apache-2.0
// The ToMe kernels of one instruction set: head mean, merge, gather here, the matching in tome_plan.inl. Compiled once
// per instruction set, LRC_ISA names the namespace.

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/tome.h"

namespace lrc::cpu::LRC_ISA {
namespace {

#include "cpu/vec.inl"

template <class T>
struct TokenPointer {
  const TokenRows& rows;
  T* base;

  int64_t pieces() const { return rows.shuffle * rows.shuffle; }
  T* operator()(int64_t token, int64_t piece) const {
    const int64_t frame = token / rows.tokens_per_frame, u = token - frame * rows.tokens_per_frame;
    if (rows.shuffle == 1) return base + frame * rows.frame_stride + (rows.prefix + u) * rows.row_stride;
    const int64_t i = u / rows.grid_width, j = u - i * rows.grid_width;
    const int64_t di = piece / rows.shuffle, dj = piece - di * rows.shuffle;
    const int64_t row = (i * rows.shuffle + di) * rows.grid_width * rows.shuffle + j * rows.shuffle + dj;
    return base + frame * rows.frame_stride + (rows.prefix + row) * rows.row_stride;
  }
};

constexpr int kHeadVectors = 8;

// acc[0, count) += sum over the heads of one piece, x at the first head's channel; NV vectors stay in registers. A lane
// past `count` reads the next channels, so the heads that would read past `end` load fewer lanes.
template <int NV, class T>
inline void sum_heads(const T* x, const T* end, int64_t heads, int64_t head_dim, int64_t count, float* acc) {
  Vec sum[NV];
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) sum[v] = load(acc + v * kLanes);
  int64_t h = 0;
  for (; h < heads && x + NV * kLanes <= end; ++h, x += head_dim) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[v] += load(x + v * kLanes);
  }
  for (; h < heads; ++h, x += head_dim) {
#pragma GCC unroll 8
    for (int v = 0; v < NV - 1; ++v) sum[v] += load(x + v * kLanes);
    sum[NV - 1] += load_first(x + (NV - 1) * kLanes, count - (NV - 1) * kLanes);
  }
#pragma GCC unroll 8
  for (int v = 0; v < NV; ++v) store(acc + v * kLanes, sum[v]);
}

template <class T>
inline void sum_heads_any(const T* x, const T* end, int64_t heads, int64_t head_dim, int64_t count, float* acc) {
  switch ((count + kLanes - 1) / kLanes) {
    case 1:
      return sum_heads<1>(x, end, heads, head_dim, count, acc);
    case 2:
      return sum_heads<2>(x, end, heads, head_dim, count, acc);
    case 3:
      return sum_heads<3>(x, end, heads, head_dim, count, acc);
    case 4:
      return sum_heads<4>(x, end, heads, head_dim, count, acc);
    case 5:
      return sum_heads<5>(x, end, heads, head_dim, count, acc);
    case 6:
      return sum_heads<6>(x, end, heads, head_dim, count, acc);
    case 7:
      return sum_heads<7>(x, end, heads, head_dim, count, acc);
    default:
      return sum_heads<8>(x, end, heads, head_dim, count, acc);
  }
}

// Heads that straddle the pieces of a token: channel by channel.
template <class T>
inline void straddling_head_mean(TokenPointer<const T> tokens, int64_t token, int64_t head_dim, float scale,
                                 float* out) {
  for (int64_t k = 0; k < head_dim; ++k) out[k] = 0.f;
  int64_t k = 0;
  for (int64_t piece = 0; piece < tokens.pieces(); ++piece) {
    const T* x = tokens(token, piece);
    for (int64_t c = 0; c < tokens.rows.width; ++c) {
      out[k] += load_first(x + c, 1)[0];
      k = k + 1 == head_dim ? 0 : k + 1;
    }
  }
  for (k = 0; k < head_dim; ++k) out[k] *= scale;
}

template <class T>
void head_mean_of(const HeadMeanArgs& args) {
  const TokenPointer<const T> tokens{args.rows, static_cast<const T*>(args.x)};
  const int64_t width = args.rows.width, head_dim = width * tokens.pieces() / args.num_heads;
  const float scale = 1.f / static_cast<float>(args.num_heads);
  constexpr int64_t kTokens = 64, kColumns = kHeadVectors * kLanes;
  run_tasks(args.threads, (args.num_tokens + kTokens - 1) / kTokens, [&](int, int64_t task) {
    const int64_t first = task * kTokens;
    const int64_t end = first + kTokens < args.num_tokens ? first + kTokens : args.num_tokens;
    for (int64_t token = first; token < end; ++token) {
      float* out = args.metric + token * head_dim;
      if (width % head_dim != 0) {
        straddling_head_mean<T>(tokens, token, head_dim, scale, out);
        continue;
      }
      for (int64_t k = 0; k < head_dim; k += kColumns) {
        const int64_t count = head_dim - k < kColumns ? head_dim - k : kColumns;
        float acc[kColumns] = {};
        for (int64_t piece = 0; piece < tokens.pieces(); ++piece) {
          const T* x = tokens(token, piece);
          sum_heads_any(x + k, x + width, width / head_dim, head_dim, count, acc);
        }
        int64_t c = 0;
        for (; c + kLanes <= count; c += kLanes) store(out + k + c, load(acc + c) * scale);
        if (c < count) store_first(out + k + c, load(acc + c) * scale, count - c);
      }
    }
  });
}

constexpr int kMergeRows = 4;

// One step over kMergeRows or fewer tokens of a group, in order: acc = [acc +] w0 x0 + w1 x1 + ...; the last step
// divides by the group's size and stores to y. Between the steps acc lies in L1.
template <int M, class T>
inline void merge_step(const T* const* x, const float* w, bool first, bool last, float size, int64_t count, float* acc,
                       T* y) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    Vec sum = first ? load(x[0] + c) * w[0] : load(acc + c) + load(x[0] + c) * w[0];
#pragma GCC unroll 8
    for (int m = 1; m < M; ++m) sum += load(x[m] + c) * w[m];
    if (last) {
      store(y + c, sum / size);
    } else {
      store(acc + c, sum);
    }
  }
  if (c == count) return;
  Vec sum = load_first(x[0] + c, count - c) * w[0];
  if (!first) sum += load(acc + c);
  for (int m = 1; m < M; ++m) sum += load_first(x[m] + c, count - c) * w[m];
  if (last) {
    store_first(y + c, sum / size, count - c);
  } else {
    store(acc + c, sum);
  }
}

template <class T>
void merge_of(const MergeArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  const TokenPointer<const T> tokens{args.rows, static_cast<const T*>(args.x)};
  const int64_t width = args.rows.width, blocks = (width + kMergeColumns - 1) / kMergeColumns;
  const int64_t tasks_per_row = tokens.pieces() * blocks;
  run_tasks(args.threads, args.num_out * tasks_per_row, [&](int worker, int64_t task) {
    const int64_t row = task / tasks_per_row, part = task - row * tasks_per_row;
    const int64_t piece = part / blocks, column = (part - piece * blocks) * kMergeColumns;
    const int64_t count = width - column < kMergeColumns ? width - column : kMergeColumns;
    float* acc = scratch + worker * kMergeColumns;
    T* y = static_cast<T*>(args.y) + row * width * tokens.pieces() + piece * width + column;
    const int64_t start = group_start[row], end = group_start[row + 1];
    const float size = args.size == nullptr ? 1.f : args.size[row];
    if (start == end || size == 0.f) {
      __builtin_memset(y, 0, count * sizeof(T));
      return;
    }
    for (int64_t i = start; i < end; i += kMergeRows) {
      const int64_t m = end - i < kMergeRows ? end - i : kMergeRows;
      const T* x[kMergeRows];
      float w[kMergeRows];
      for (int64_t q = 0; q < m; ++q) {
        x[q] = tokens(member[i + q], piece) + column;
        w[q] = args.weight == nullptr ? 1.f : args.weight[member[i + q]];
      }
      const bool first = i == start, last = i + m == end;
      switch (m) {
        case 1:
          merge_step<1>(x, w, first, last, size, count, acc, y);
          break;
        case 2:
          merge_step<2>(x, w, first, last, size, count, acc, y);
          break;
        case 3:
          merge_step<3>(x, w, first, last, size, count, acc, y);
          break;
        default:
          merge_step<4>(x, w, first, last, size, count, acc, y);
          break;
      }
    }
  });
}

template <class T>
inline void scale_row(const T* y, float scale, int64_t count, T* x) {
  if (scale == 1.f) {
    __builtin_memcpy(x, y, count * sizeof(T));
    return;
  }
  if (scale == 0.f) {
    __builtin_memset(x, 0, count * sizeof(T));
    return;
  }
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) store(x + c, load(y + c) * scale);
  if (c < count) store_first(x + c, load_first(y + c, count - c) * scale, count - c);
}

template <class T>
void gather_of(const GatherArgs& args) {
  const TokenPointer<T> tokens{args.rows, static_cast<T*>(args.x)};
  const TokenRows& rows = args.rows;
  const T* y = static_cast<const T*>(args.y);
  constexpr int64_t kTokens = 16;
  run_tasks(args.threads, (args.num_tokens + kTokens - 1) / kTokens, [&](int, int64_t task) {
    const int64_t first = task * kTokens;
    const int64_t end = first + kTokens < args.num_tokens ? first + kTokens : args.num_tokens;
    for (int64_t token = first; token < end; ++token) {
      const int64_t row = args.assign[token];
      float scale = args.weight == nullptr ? 1.f : args.weight[token];
      if (args.size != nullptr) scale = args.size[row] == 0.f ? 0.f : scale / args.size[row];
      for (int64_t piece = 0; piece < tokens.pieces(); ++piece) {
        scale_row(y + (row * tokens.pieces() + piece) * rows.width, scale, rows.width, tokens(token, piece));
      }
      if (token % rows.tokens_per_frame != 0) continue;
      T* frame = tokens.base + token / rows.tokens_per_frame * rows.frame_stride;
      for (int64_t p = 0; p < rows.prefix; ++p) {
        __builtin_memset(frame + p * rows.row_stride, 0, rows.width * sizeof(T));
      }
    }
  });
}

void head_mean(const HeadMeanArgs& args) {
  if (args.dtype == DType::kFloat32) return head_mean_of<float>(args);
  return args.dtype == DType::kBFloat16 ? head_mean_of<BFloat16>(args) : head_mean_of<Float16>(args);
}

void merge(const MergeArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  if (args.dtype == DType::kFloat32) return merge_of<float>(args, group_start, member, scratch);
  if (args.dtype == DType::kBFloat16) return merge_of<BFloat16>(args, group_start, member, scratch);
  return merge_of<Float16>(args, group_start, member, scratch);
}

void gather(const GatherArgs& args) {
  if (args.dtype == DType::kFloat32) return gather_of<float>(args);
  return args.dtype == DType::kBFloat16 ? gather_of<BFloat16>(args) : gather_of<Float16>(args);
}

#include "cpu/tome_plan.inl"

}  // namespace

extern const TomeKernels kTomeKernels;
const TomeKernels kTomeKernels = {head_mean, plan_workspace_bytes, plan, merge, gather};

}  // namespace lrc::cpu::LRC_ISA
