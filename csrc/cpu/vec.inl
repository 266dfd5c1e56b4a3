// SPDX-License-Identifier: Apache-2.0
// One fp32 vector of the instruction set, conversions from and to the 16-bit formats, and a work queue over threads.
// Included inside the namespace of an instruction set. No std headers: their inline functions, compiled for AVX-512,
// could be the copies that the linker keeps for the whole module.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vec splat(float value) {
  return value - Vec{};
}
inline BitVec splat_bits(uint32_t value) {
  return BitVec{} + value;
}

inline Vec to_float(HalfVec bits, BFloat16) {
#if defined(__AVX512F__)
  // GCC 12 widens a vector of 32 bytes in halves, which costs four instructions more.
  return bit_cast<Vec>(_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(bits)), 16));
#else
  return bit_cast<Vec>(__builtin_convertvector(bits, BitVec) << 16);
#endif
}

// The upper halves hold the bf16 nearest to each value, ties to even; a NaN keeps its upper bits and becomes quiet.
inline BitVec round_upper_half(Vec value) {
  const BitVec bits = bit_cast<BitVec>(value);
  const BitVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const BitVec is_nan = bit_cast<BitVec>((bits & 0x7fffffffu) > splat_bits(0x7f800000u));
  return (is_nan & (bits | 0x00400000u)) | (~is_nan & rounded);
}
inline HalfVec from_float(Vec value, BFloat16) {
  return __builtin_convertvector(round_upper_half(value) >> 16, HalfVec);
}
inline Vec round_to_bf16(Vec value) {
  return bit_cast<Vec>(round_upper_half(value) & 0xffff0000u);
}

#if defined(__AVX512F__)
inline Vec to_float(HalfVec bits, Float16) {
  return bit_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
inline HalfVec from_float(Vec value, Float16) {
  return bit_cast<HalfVec>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec to_float(HalfVec bits, Float16) {
  return bit_cast<Vec>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
inline HalfVec from_float(Vec value, Float16) {
  return bit_cast<HalfVec>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec to_float(HalfVec bits, Float16) {
  const BitVec wide = __builtin_convertvector(bits, BitVec);
  const BitVec magnitude = wide & 0x7fffu;
  // 2^112 moves fp16's exponent bias to fp32's, for subnormal numbers too.
  const BitVec finite = bit_cast<BitVec>(bit_cast<Vec>(magnitude << 13) * 0x1p112f);
  const BitVec special = bit_cast<BitVec>(magnitude >= splat_bits(0x7c00u));
  const BitVec exponent = special & 0x7f800000u;
  return bit_cast<Vec>(((wide & 0x8000u) << 16) | (finite & ~special) | exponent | (special & (magnitude << 13)));
}
inline HalfVec from_float(Vec value, Float16) {
  const BitVec bits = bit_cast<BitVec>(value);
  const BitVec sign = (bits >> 16) & 0x8000u;
  const BitVec magnitude = bits & 0x7fffffffu;
  const BitVec normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves a subnormal result, rounded to nearest even, in the lowest bits of the sum.
  const BitVec subnormal = bit_cast<BitVec>(bit_cast<Vec>(magnitude) + 0.5f) - 0x3f000000u;
  const BitVec is_small = bit_cast<BitVec>(magnitude < splat_bits(0x38800000u));
  const BitVec is_large = bit_cast<BitVec>(magnitude >= splat_bits(0x47800000u));
  const BitVec is_nan = bit_cast<BitVec>(magnitude > splat_bits(0x7f800000u));
  const BitVec large = 0x7c00u | (is_nan & (0x0200u | ((magnitude >> 13) & 0x3ffu)));
  const BitVec result = (is_large & large) | (~is_large & ((is_small & subnormal) | (~is_small & normal)));
  return __builtin_convertvector(sign | result, HalfVec);
}
#endif

inline Vec load(const float* p) {
  Vec value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}
inline void store(float* p, Vec value) {
  __builtin_memcpy(p, &value, sizeof(value));
}

template <class T>
inline Vec load(const T* p) {
  HalfVec bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return to_float(bits, T{});
}
template <class T>
inline void store(T* p, Vec value) {
  const HalfVec bits = from_float(value, T{});
  __builtin_memcpy(p, &bits, sizeof(bits));
}

template <class T>
inline Vec load_first(const T* p, int64_t count) {
  T padded[kLanes] = {};
  __builtin_memcpy(padded, p, count * sizeof(T));
  return load(padded);
}
template <class T>
inline void store_first(T* p, Vec value, int64_t count) {
  T padded[kLanes];
  store(padded, value);
  __builtin_memcpy(p, padded, count * sizeof(T));
}

// GCC's shuffle takes any mask and folds a constant one; clang gets there from the loop.
template <class V>
inline V shuffle(V a, V b, IntVec lanes) {
#if defined(__GNUC__) && !defined(__clang__)
  return __builtin_shuffle(a, b, lanes);
#else
  V result;
  for (int lane = 0; lane < kLanes; ++lane)
    result[lane] = lanes[lane] < kLanes ? a[lanes[lane]] : b[lanes[lane] - kLanes];
  return result;
#endif
}

inline IntVec lane_index() {
  IntVec index = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}

// 2 * kLanes neighbouring channels in the order in which they unpack cheapest: the even and the odd ones for bf16,
// otherwise the first and the second half. Sums stay in that order from load_pair to store_pair or split.
struct Pair {
  Vec first, second;
};

template <class T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}
inline Pair load_pair(const BFloat16* p) {
  BitVec bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return {bit_cast<Vec>(bits << 16), bit_cast<Vec>(bits & 0xffff0000u)};
}

template <class T>
inline void store_pair(T* p, Pair value) {
  store(p, value.first);
  store(p + kLanes, value.second);
}
inline void store_pair(BFloat16* p, Pair value) {
  const BitVec bits = (round_upper_half(value.first) >> 16) | (round_upper_half(value.second) & 0xffff0000u);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

// The order of load_pair(const T*) to the order of the channels.
template <class T>
inline Pair split(Pair value, T) {
  return value;
}
inline Pair split(Pair value, BFloat16) {
  const IntVec low = (lane_index() >> 1) + (lane_index() & 1) * kLanes;
  return {shuffle(value.first, value.second, low), shuffle(value.first, value.second, low + kLanes / 2)};
}

inline float sum_lanes(Vec v) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) v += shuffle(v, v, (lane_index() + step) & (kLanes - 1));
  return v[0];
}

// rows[i][j] becomes rows[j][i]: each round interleaves the first half of the vectors with the second.
inline void transpose(Vec* rows) {
  const IntVec low = (lane_index() >> 1) + (lane_index() & 1) * kLanes, high = low + kLanes / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = shuffle(rows[i], rows[i + kLanes / 2], low);
      mixed[2 * i + 1] = shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// body(worker) for each worker. With one thread there is no parallel region at all: after a fork, a process that has
// used OpenMP before hangs in it.
template <class Body>
inline void run_workers(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int worker = 0; worker < threads; ++worker) body(worker);
    return;
  }
#endif
  for (int worker = 0; worker < threads; ++worker) body(worker);
}

// body(worker, task) for each task, handed out one by one: groups and segments differ in size.
template <class Body>
inline void run_tasks(int threads, int64_t num_tasks, const Body& body) {
  int64_t next = 0;
  run_workers(threads < num_tasks ? threads : static_cast<int>(num_tasks), [&](int worker) {
    for (int64_t task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < num_tasks;) body(worker, task);
  });
}
