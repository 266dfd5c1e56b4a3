// SPDX-License-Identifier: Apache-2.0
// The ToMe kernels of one instruction set: head mean, gather and the whole of it here, the merge in tome_merge.inl, the
// matching in tome_plan.inl. Compiled once per instruction set, LRC_ISA names the namespace.

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

// Two tokens at once are two streams of memory, which the prefetchers serve faster than one.
constexpr int kHeadTokens = kLanes == 16 ? 2 : 1;

// out[r] = scale * sum over the heads of token r: NP pairs of vectors of `head_dim` channels from channel k on.
template <int NP, int R, class T>
inline void mean_of_pairs(TokenPointer<const T> tokens, int64_t token, int64_t k, int64_t head_dim, float scale,
                          float* out) {
  Pair sum[R][NP] = {};
  const int64_t heads = tokens.rows.width / head_dim;
  // Where the next tokens lie, but at the end of a row of the grid: on their way from memory while these are summed.
  const int64_t ahead = R * tokens.rows.shuffle * tokens.rows.row_stride;
  for (int64_t piece = 0; piece < tokens.pieces(); ++piece) {
    const T* x[R];
    for (int r = 0; r < R; ++r) x[r] = tokens(token + r, piece) + k;
    for (int64_t h = 0; h < heads; ++h) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < NP; ++v) {
          const T* at = x[r] + h * head_dim + v * 2 * kLanes;
          __builtin_prefetch(at + ahead);
          const Pair value = load_pair(at);
          sum[r][v].first += value.first;
          sum[r][v].second += value.second;
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NP; ++v) {
      const Pair value = split(sum[r][v], T{});
      store(out + r * head_dim + k + v * 2 * kLanes, value.first * scale);
      store(out + r * head_dim + k + v * 2 * kLanes + kLanes, value.second * scale);
    }
  }
}

// Heads of whole pairs of vectors.
template <int R, class T>
inline void mean_of_tokens(TokenPointer<const T> tokens, int64_t token, int64_t head_dim, float scale, float* out) {
  constexpr int64_t kPairColumns = 2 * kLanes;
  for (int64_t k = 0; k < head_dim;) {
    const int64_t pairs = (head_dim - k) / kPairColumns;
    switch (pairs < 4 ? pairs : 4) {
      case 1:
        mean_of_pairs<1, R>(tokens, token, k, head_dim, scale, out);
        break;
      case 2:
        mean_of_pairs<2, R>(tokens, token, k, head_dim, scale, out);
        break;
      case 3:
        mean_of_pairs<3, R>(tokens, token, k, head_dim, scale, out);
        break;
      default:
        mean_of_pairs<4, R>(tokens, token, k, head_dim, scale, out);
        break;
    }
    k += (pairs < 4 ? pairs : 4) * kPairColumns;
  }
}

template <class T>
inline void mean_of_token(TokenPointer<const T> tokens, int64_t token, int64_t head_dim, float scale, float* out) {
  constexpr int64_t kColumns = kHeadVectors * kLanes;
  const int64_t width = tokens.rows.width;
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

template <class T>
void head_mean_of(const HeadMeanArgs& args) {
  const TokenPointer<const T> tokens{args.rows, static_cast<const T*>(args.x)};
  const int64_t head_dim = args.rows.width * tokens.pieces() / args.num_heads;
  const float scale = 1.f / static_cast<float>(args.num_heads);
  const bool straddles = args.rows.width % head_dim != 0, whole = head_dim % (2 * kLanes) == 0;
  constexpr int64_t kTokens = 64;
  run_tasks(args.threads, (args.num_tokens + kTokens - 1) / kTokens, [&](int, int64_t task) {
    const int64_t first = task * kTokens;
    const int64_t end = first + kTokens < args.num_tokens ? first + kTokens : args.num_tokens;
    for (int64_t token = first; token < end;) {
      float* out = args.metric + token * head_dim;
      if (straddles) {
        straddling_head_mean<T>(tokens, token++, head_dim, scale, out);
      } else if (!whole) {
        mean_of_token<T>(tokens, token++, head_dim, scale, out);
      } else if (token + kHeadTokens <= end) {
        mean_of_tokens<kHeadTokens, T>(tokens, token, head_dim, scale, out);
        token += kHeadTokens;
      } else {
        mean_of_tokens<1, T>(tokens, token++, head_dim, scale, out);
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

void gather(const GatherArgs& args) {
  if (args.dtype == DType::kFloat32) return gather_of<float>(args);
  return args.dtype == DType::kBFloat16 ? gather_of<BFloat16>(args) : gather_of<Float16>(args);
}

#include "cpu/tome_merge.inl"
#include "cpu/tome_plan.inl"

struct ClipWorkspace {
  char* plan;
  float *metric, *scratch;
  int64_t *group_start, *member;
  int64_t bytes;
};

ClipWorkspace carve_clip(char* base, const CompressArgs& args, int64_t max_seqlen) {
  ClipWorkspace ws;
  int64_t offset = 0;
  carve(base, &offset, plan_workspace_bytes(max_seqlen, args.plan.num_channels), &ws.plan);
  carve(base, &offset, max_seqlen * args.plan.num_channels, &ws.metric);
  carve(base, &offset, kMergeColumns * args.plan.threads, &ws.scratch);
  carve(base, &offset, max_seqlen + 2, &ws.group_start);
  carve(base, &offset, max_seqlen, &ws.member);
  ws.bytes = offset;
  return ws;
}

int64_t compress_workspace_bytes(const CompressArgs& args, int64_t max_seqlen) {
  return carve_clip(nullptr, args, max_seqlen).bytes;
}

int64_t compress(const CompressArgs& args, char* workspace, int64_t stride) {
  const PlanArgs& plan = args.plan;
  const int64_t element = args.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row_bytes = args.rows.width * args.rows.shuffle * args.rows.shuffle * element;
  const int64_t max_seqlen = longest_segment(plan);
  return run_segments(plan, [&](int worker, int64_t segment, int threads) {
    const ClipWorkspace ws = carve_clip(workspace + worker * stride, args, max_seqlen);
    const int64_t start = plan.cu_seqlens_in[segment], n = plan.cu_seqlens_in[segment + 1] - start;
    const int64_t row = plan.cu_seqlens_out[segment], num_rows = plan.cu_seqlens_out[segment + 1] - row;
    if (num_rows > n) return false;
    if (n == 0) return true;
    const int64_t frame = start / args.rows.tokens_per_frame;
    const char* x = static_cast<const char*>(args.x) + frame * args.rows.frame_stride * element;
    if (row_bytes > 0) head_mean({x, args.dtype, args.rows, n, args.num_heads, ws.metric, threads});
    if (!plan_segment(plan, segment, ws.metric, ws.plan, max_seqlen, threads)) return false;
    group_tokens(plan.assign + start, plan.weight + start, n, static_cast<int32_t>(row), num_rows, ws.group_start,
                 ws.member);
    char* y = static_cast<char*>(args.y) + row * row_bytes;
    merge({x, args.dtype, args.rows, n, nullptr, plan.size_out + row, plan.weight + start, Reduction::kMean, num_rows,
           y, threads},
          ws.group_start, ws.member, ws.scratch);
    return true;
  });
}

}  // namespace

extern const TomeKernels kTomeKernels;
const TomeKernels kTomeKernels = {head_mean, plan_workspace_bytes,     plan,     merge,
                                  gather,    compress_workspace_bytes, compress, max_backward};

}  // namespace lrc::cpu::LRC_ISA
