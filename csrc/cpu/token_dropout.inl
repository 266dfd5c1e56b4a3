// SPDX-License-Identifier: Apache-2.0
// The attention scores of one instruction set: logits and block statistics, their merge, the reduction over heads and
// rows. Compiled once per instruction set, LRC_ISA names the namespace.

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/token_dropout.h"

namespace lrc::cpu::LRC_ISA {
namespace {

#include "cpu/vec.inl"

constexpr float kInfinity = __builtin_inff();
constexpr int kBlockVectors = kScoreBlock / kLanes;
constexpr int64_t kPrefetchKeys = 16;

// e^x within 1.5 ulp; NaN stays NaN, what is below 2^-125 becomes 0.
inline Vec exp(Vec x) {
  const Vec low = splat(-86.6434f), high = splat(88.7228f);
  const Vec clamped = x > high ? high : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  const Vec shifted = clamped * 1.44269504f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r) * r + r + 1.f;
  // 2^128 is no float: the power is applied less one, then doubled.
  const BitVec power = (bit_cast<BitVec>(shifted) - 0x4b400000u + 126u) << 23;
  y = y * bit_cast<Vec>(power) * 2.f;
  y = x > high ? splat(kInfinity) : y;
  return x < low ? Vec{} : y;
}

// a and b halved: the 128-bit quarters of the sum hold {a, b} of the lanes that the two index vectors pair.
inline Vec fold(Vec a, Vec b, IntVec first, int32_t distance) {
  return shuffle(a, b, first) + shuffle(a, b, first + distance);
}

// Lane i of the result is the sum of the lanes of v[i]. Every sum is the same tree, whatever i is: first within
// quarters of 128 bits, by shuffles that every instruction set has, then over the quarters.
inline Vec sum_each(const Vec* v) {
  const IntVec lane = lane_index() & 3, quarter = lane_index() >> 2;
  const IntVec unpack = lane_index() - lane + (lane >> 1) + (lane & 1) * kLanes;
  Vec four[kLanes / 4];
#pragma GCC unroll 4
  for (int g = 0; g < kLanes / 4; ++g) {
    const Vec even = fold(v[4 * g], v[4 * g + 2], unpack, 2), odd = fold(v[4 * g + 1], v[4 * g + 3], unpack, 2);
    four[g] = fold(even, odd, unpack, 2);
  }
  if constexpr (kLanes == 4) {
    return four[0];
  } else if constexpr (kLanes == 8) {
    return fold(four[0], four[1], lane + quarter * kLanes, 4);
  } else {
    const IntVec near = lane + (quarter & 1) * 4 + (quarter >> 1) * kLanes;
    const IntVec far = lane + (quarter & 1) * 8 + (quarter >> 1) * kLanes;
    return fold(fold(four[0], four[1], near, 8), fold(four[kLanes / 4 - 2], four[kLanes / 4 - 1], near, 8), far, 4);
  }
}

constexpr int kMaxQueries = kLanes < 8 ? kLanes : 8;

// How keys of type T meet packed queries: kStep channels at a time.
template <class T>
struct Product {
  typedef float Query;
  typedef Vec Operand;
  static constexpr int64_t kStep = kLanes;
  static Operand load(const T* p) { return LRC_ISA::load(p); }
  static Operand load_first(const T* p, int64_t count) { return LRC_ISA::load_first(p, count); }
  static Operand load_query(const float* p) { return LRC_ISA::load(p); }
  static Vec add(Vec acc, Operand a, Operand b) { return acc + a * b; }
  static float query(float value) { return value; }
};

#if defined(__AVX512BF16__)
// Two bf16 products per lane and instruction, exact and added in fp32; subnormal numbers count as 0.
template <>
struct Product<BFloat16> {
  typedef BFloat16 Query;
  typedef __m512bh Operand;
  static constexpr int64_t kStep = 2 * kLanes;
  static Operand load(const BFloat16* p) { return bit_cast<Operand>(_mm512_loadu_si512(p)); }
  static Operand load_first(const BFloat16* p, int64_t count) {
    return bit_cast<Operand>(_mm512_maskz_loadu_epi16((uint32_t{1} << count) - 1, p));
  }
  static Operand load_query(const BFloat16* p) { return load(p); }
  static BFloat16 query(float value) { return {static_cast<uint16_t>(bit_cast<uint32_t>(value) >> 16)}; }
  static Vec add(Vec acc, Operand a, Operand b) { return bit_cast<Vec>(_mm512_dpbf16_ps(bit_cast<__m512>(acc), a, b)); }
};
#endif

// Q queries times kLanes / Q keys. out[query * kScoreBlock + key]; of the queries the first `count` are written.
template <int Q, class T>
inline void dot_tile(const T* const* key, const typename Product<T>::Query* q, int64_t q_stride, int64_t head_dim,
                     int64_t count, float* out) {
  typedef Product<T> P;
  constexpr int kKeys = kLanes / Q;
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = Vec{};
  int64_t c = 0;
  for (; c + P::kStep <= head_dim; c += P::kStep) {
    typename P::Operand k[kKeys];
#pragma GCC unroll 16
    for (int t = 0; t < kKeys; ++t) k[t] = P::load(key[t] + c);
#pragma GCC unroll 8
    for (int m = 0; m < Q; ++m) {
      const auto b = P::load_query(q + m * q_stride + c);
#pragma GCC unroll 16
      for (int t = 0; t < kKeys; ++t) acc[m * kKeys + t] = P::add(acc[m * kKeys + t], k[t], b);
    }
  }
  if (c < head_dim) {
#pragma GCC unroll 16
    for (int t = 0; t < kKeys; ++t) {
      const auto k = P::load_first(key[t] + c, head_dim - c);
#pragma GCC unroll 8
      for (int m = 0; m < Q; ++m)
        acc[m * kKeys + t] = P::add(acc[m * kKeys + t], k, P::load_query(q + m * q_stride + c));
    }
  }
  const Vec sums = sum_each(acc);
  for (int64_t m = 0; m < count; ++m)
    __builtin_memcpy(out + m * kScoreBlock, reinterpret_cast<const float*>(&sums) + m * kKeys, kKeys * sizeof(float));
}

// How many of `rest` queries go into one tile, padded: 8, 4, 2 or 1.
inline int64_t queries_of_tile(int64_t rest) {
  return rest > 4 && kMaxQueries == 8 ? 8 : rest > 2 ? 4 : rest;
}

// Keys that go together: as many as the tile with the fewest queries takes.
inline int64_t keys_of_tile(int64_t num_queries) {
  const int64_t last = num_queries % kMaxQueries;
  return kLanes / (last == 0 ? kMaxQueries : last == 5 ? 1 : queries_of_tile(last));
}

// Some keys of one head against all its queries; each key is read from memory by the first of them.
template <class T>
inline void dot_head(const T* const* key, int64_t num_keys, const typename Product<T>::Query* q, int64_t q_stride,
                     int64_t head_dim, int64_t num_queries, float* out) {
  for (int64_t m = 0, step; m < num_queries; m += step) {
    const int64_t rest = num_queries - m;
    step = queries_of_tile(rest);
    const auto* first = q + m * q_stride;
    const int64_t count = rest < step ? rest : step;
    for (int64_t t = 0; t < num_keys; t += kLanes / step) {
      float* to = out + m * kScoreBlock + t;
      switch (step) {
        case 1:
          dot_tile<1>(key + t, first, q_stride, head_dim, count, to);
          break;
        case 2:
          dot_tile<2>(key + t, first, q_stride, head_dim, count, to);
          break;
        case 4:
          dot_tile<4>(key + t, first, q_stride, head_dim, count, to);
          break;
        default:
          dot_tile<kMaxQueries>(key + t, first, q_stride, head_dim, count, to);
      }
    }
  }
}

template <class T>
int64_t padded_head_dim(const ScoreArgs& args) {
  return (args.keys.head_dim + Product<T>::kStep - 1) / Product<T>::kStep * Product<T>::kStep;
}

int64_t vectors_of(const ScoreArgs& args, const ScoreSpan& span) {
  return span.num_kv_heads * (args.num_heads / args.keys.num_kv_heads) * span.num_rows;
}

// Writes span.q: the query vectors, every one padded with zeros.
template <class T>
void pack_queries(const ScoreArgs& args, const ScoreSpan& span) {
  const int64_t head_dim = args.keys.head_dim, padded = padded_head_dim<T>(args);
  const int64_t group = args.num_heads / args.keys.num_kv_heads;
  auto* to = static_cast<typename Product<T>::Query*>(span.q);
  for (int64_t h = span.first_kv_head * group; h < (span.first_kv_head + span.num_kv_heads) * group; ++h) {
    for (int64_t r = 0; r < span.num_rows; ++r, to += padded) {
      const float* from = args.q + (span.row[r] * args.num_heads + h) * head_dim;
      for (int64_t c = 0; c < padded; ++c) to[c] = Product<T>::query(c < head_dim ? from[c] : 0.f);
    }
  }
  for (int64_t c = 0; c < kMaxQueries * padded; ++c) to[c] = Product<T>::query(0.f);
}

// Addresses of the keys of one block; past the end of what is seen the last key stands again.
template <class T>
inline void find_keys(const ScoreArgs& args, const ScoreSpan& span, int64_t first, const T** key) {
  const ScoreKeys& keys = args.keys;
  const T* base = static_cast<const T*>(keys.k);
  for (int64_t i = 0; i < kScoreBlock + kPrefetchKeys; ++i) {
    const int64_t j = first + i < span.num_keys ? first + i : span.num_keys - 1;
    if (keys.block_table == nullptr) {
      key[i] = base + (args.cu_seqlens[span.sequence] + j) * keys.token_stride;
    } else {
      const int64_t block = keys.block_table[span.sequence * keys.max_blocks + j / keys.block_size];
      key[i] = base + block * keys.block_stride + j % keys.block_size * keys.token_stride;
    }
  }
}

// Logits of one block into p [vectors, kScoreBlock].
template <class T>
void block_logits(const ScoreArgs& args, const ScoreSpan& span, int64_t block, float* p) {
  const ScoreKeys& keys = args.keys;
  const int64_t queries = vectors_of(args, span) / span.num_kv_heads, padded = padded_head_dim<T>(args);
  const auto* q = static_cast<const typename Product<T>::Query*>(span.q);
  const T* key[kScoreBlock + kPrefetchKeys];
  find_keys(args, span, block * kScoreBlock, key);
  const int64_t rest = span.num_keys - block * kScoreBlock, count = rest < kScoreBlock ? rest : kScoreBlock;
  const int64_t step = keys_of_tile(queries), line = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < count; j += step) {
    for (int64_t h = 0; h < span.num_kv_heads; ++h) {
      const int64_t at_head = (span.first_kv_head + h) * keys.head_stride;
      const T* at[kLanes];
      for (int64_t t = 0; t < step; ++t) {
        at[t] = key[j + t] + at_head;
        const T* ahead = key[j + t + kPrefetchKeys] + at_head;
        for (int64_t c = 0; c < keys.head_dim; c += 4 * line) {
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(ahead + c + i * line, 0, 2);
        }
      }
      dot_head(at, step, q + h * queries * padded, padded, keys.head_dim, queries, p + h * queries * kScoreBlock + j);
    }
  }
}

inline float max_lanes(Vec v) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Vec other = shuffle(v, v, (lane_index() + step) & (kLanes - 1));
    v = other > v ? other : v;
  }
  return v[0];
}

// p = exp(scale * p - maximum) over the `seen` first keys, 0 over the others; the maximum is that of the keys seen
// unless an lse takes its place. A NaN among the keys makes the sum NaN.
inline void block_softmax(float* p, int64_t seen, float scale, const float* lse, float* maximum, float* sum) {
  const Vec nothing = splat(-kInfinity);
  Vec s[kBlockVectors], largest = nothing, total = {};
#pragma GCC unroll 8
  for (int i = 0; i < kBlockVectors; ++i) {
    s[i] = load(p + i * kLanes) * scale;
    if (seen < (i + 1) * kLanes) {
      const IntVec limit = static_cast<int32_t>(seen) - i * kLanes - IntVec{};
      s[i] = lane_index() < limit ? s[i] : nothing;
    }
    largest = s[i] > largest ? s[i] : largest;
  }
  *maximum = lse != nullptr ? *lse : max_lanes(largest);
  const bool is_empty = *maximum == -kInfinity;
  const Vec offset = splat(is_empty ? 0.f : *maximum);
#pragma GCC unroll 8
  for (int i = 0; i < kBlockVectors; ++i) {
    const Vec e = is_empty && lse != nullptr ? Vec{} : exp(s[i] - offset);
    store(p + i * kLanes, e);
    total += e;
  }
  *sum = sum_lanes(total);
}

// scores of one block from p and the factors of its vectors; heads and rows are added in ascending order.
void block_reduce(const ScoreArgs& args, const ScoreSpan& span, int64_t block, const float* p, const float* factor) {
  const int64_t heads = vectors_of(args, span) / span.num_rows;
  const int64_t num_blocks = (span.num_keys + kScoreBlock - 1) / kScoreBlock;
  const int64_t rest = span.num_keys - block * kScoreBlock, count = rest < kScoreBlock ? rest : kScoreBlock;
  float* scores = args.scores + args.cu_seqlens[span.sequence] + block * kScoreBlock;
  for (int64_t r = 0; r < span.num_rows; ++r) {
    if (span.visible[r] <= block * kScoreBlock) continue;
    float* kept = span.reduced == nullptr ? nullptr : span.reduced + (r * num_blocks + block) * 2 * kScoreBlock;
    // What each sum over heads rounds away is added up beside it: a mean of many heads then errs no more than one.
    Vec acc[kBlockVectors], lost[kBlockVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kBlockVectors; ++i) {
      acc[i] = span.first_heads ? Vec{} : load(kept + i * kLanes);
      lost[i] = span.first_heads ? Vec{} : load(kept + kScoreBlock + i * kLanes);
    }
    for (int64_t v = r; v < heads * span.num_rows; v += span.num_rows) {
      const float* from = p + v * kScoreBlock;
      const Vec scale = splat(factor[v]);
#pragma GCC unroll 8
      for (int i = 0; i < kBlockVectors; ++i) {
        const Vec value = load(from + i * kLanes) * scale;
        if (args.max_over_heads) {
          acc[i] = (value > acc[i]) | (value != value) ? value : acc[i];
        } else {
          const Vec sum = acc[i] + value, taken = sum - acc[i];
          lost[i] += (acc[i] - (sum - taken)) + (value - taken);
          acc[i] = sum;
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kBlockVectors; ++i) {
      const int64_t j = i * kLanes, lanes = count - j < kLanes ? count - j : kLanes;
      if (!span.last_heads) {
        store(kept + j, acc[i]);
        store(kept + kScoreBlock + j, lost[i]);
        continue;
      }
      // Beside an infinity nothing is lost, but NaN stands there.
      const Vec total = (lost[i] == lost[i] ? acc[i] + lost[i] : acc[i]) * span.row_scale;
      if (lanes == kLanes) {
        store(scores + j, load(scores + j) + total);
      } else if (lanes > 0) {
        store_first(scores + j, load_first(scores + j, lanes) + total, lanes);
      }
    }
  }
}

template <class T>
void block_scores(const ScoreArgs& args, const ScoreSpan& span, int64_t block) {
  const int64_t vectors = vectors_of(args, span), group = args.num_heads / args.keys.num_kv_heads;
  float* p = span.p + block * vectors * kScoreBlock;
  float *maximum = span.maximum + block * vectors, *sum = span.sum + block * vectors;
  block_logits<T>(args, span, block, p);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t h = span.first_kv_head * group + v / span.num_rows, r = v % span.num_rows;
    const float* lse = args.lse == nullptr ? nullptr : args.lse + h * args.num_rows + span.row[r];
    const int64_t seen = span.visible[r] - block * kScoreBlock;
    block_softmax(p + v * kScoreBlock,
                  seen < 0             ? 0
                  : seen < kScoreBlock ? seen
                                       : kScoreBlock,
                  args.softmax_scale, lse, maximum + v, sum + v);
    if (lse != nullptr) maximum[v] = 1.f;
  }
  if (args.lse != nullptr) block_reduce(args, span, block, p, maximum);
}

// Over the blocks of one vector, `step` floats apart, ascending: factor = exp(block maximum - maximum) / sum. It may
// take the place of the maximum.
void merge_blocks(const float* m, const float* sum, int64_t num_blocks, int64_t step, float* factor) {
  float largest = -kInfinity;
  for (int64_t b = 0; b < num_blocks; ++b) largest = m[b * step] > largest ? m[b * step] : largest;
  // In double precision, so that what is rounded is each key's own exponential and this factor, once.
  const auto weight = [&](int64_t b) {
    return m[b * step] == largest ? 1. : __builtin_exp(static_cast<double>(m[b * step]) - largest);
  };
  double total = 0.;
  for (int64_t b = 0; b < num_blocks; ++b) total += weight(b) * sum[b * step];
  for (int64_t b = 0; b < num_blocks; ++b) factor[b * step] = static_cast<float>(weight(b) / total);
}

void factors(const FactorArgs& args) {
  for (int64_t s = 0; s < args.num_sequences; ++s) {
    for (int64_t h = 0; h < args.num_heads; ++h) {
      const int64_t at = (s * args.num_heads + h) * args.num_blocks;
      merge_blocks(args.maximum + at, args.sum + at, args.seen[s], 1, args.factor + at);
    }
  }
}

// Statistics of a sequence that is one block go out, or the factor of its blocks comes in; see ScoreArgs.
void exchange_statistics(const ScoreArgs& args, const ScoreSpan& span) {
  const int64_t group = args.num_heads / args.keys.num_kv_heads, vectors = vectors_of(args, span);
  for (int64_t v = 0; v < vectors; ++v) {
    const int64_t h = span.first_kv_head * group + v / span.num_rows, r = span.row[v % span.num_rows];
    if (args.statistics != nullptr) {
      args.statistics[r * args.num_heads + h] = span.maximum[v];
      args.statistics[(args.num_rows + r) * args.num_heads + h] = span.sum[v];
    } else {
      span.maximum[v] = args.factor[r * args.num_heads + h];
    }
  }
}

template <class Body>
void for_each_block(const ScoreArgs& args, const ScoreSpan* spans, int64_t num_spans, const Body& body) {
  const ScoreSpan& last = spans[num_spans - 1];
  const int64_t num_tasks = last.first_task + (last.num_keys + kScoreBlock - 1) / kScoreBlock;
  run_tasks(args.threads, num_tasks, [&](int, int64_t task) {
    int64_t low = 0, high = num_spans;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (spans[middle].first_task <= task ? low : high) = middle;
    }
    body(spans[low], task - spans[low].first_task);
  });
}

template <class T>
void scores_of(const ScoreArgs& args, const ScoreSpan* spans, int64_t num_spans) {
  for (int64_t i = 0; i < num_spans; ++i) pack_queries<T>(args, spans[i]);
  for_each_block(args, spans, num_spans,
                 [&](const ScoreSpan& span, int64_t block) { block_scores<T>(args, span, block); });
  if (args.lse != nullptr) return;
  run_tasks(args.threads, num_spans, [&](int, int64_t i) {
    const ScoreSpan& span = spans[i];
    const int64_t vectors = vectors_of(args, span);
    if (args.statistics != nullptr || args.factor != nullptr) return exchange_statistics(args, span);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t num_blocks = (span.visible[v % span.num_rows] + kScoreBlock - 1) / kScoreBlock;
      merge_blocks(span.maximum + v, span.sum + v, num_blocks, vectors, span.maximum + v);
    }
  });
  if (args.statistics != nullptr) return;
  for_each_block(args, spans, num_spans, [&](const ScoreSpan& span, int64_t block) {
    const int64_t vectors = vectors_of(args, span);
    block_reduce(args, span, block, span.p + block * vectors * kScoreBlock, span.maximum + block * vectors);
  });
}

void scores(const ScoreArgs& args, const ScoreSpan* spans, int64_t num_spans) {
  switch (args.keys.dtype) {
    case DType::kFloat32:
      return scores_of<float>(args, spans, num_spans);
    case DType::kBFloat16:
      return scores_of<BFloat16>(args, spans, num_spans);
    case DType::kFloat16:
      return scores_of<Float16>(args, spans, num_spans);
  }
}

}  // namespace

extern const TokenDropoutKernels kTokenDropoutKernels;
const TokenDropoutKernels kTokenDropoutKernels = {2 * kLanes, scores, factors};

}  // namespace lrc::cpu::LRC_ISA
