// SPDX-License-Identifier: Apache-2.0
// The merge of token rows by their groups, and the backward of its maximum. Included by tome.inl inside the namespace
// of an instruction set.

constexpr int kMergeRows = 4;

// What the last step of a mean does to a sum. A quotient that rounds to 16 bits may as well be a product, where the
// inverse of the size is an ordinary number.
struct Divisor {
  float size, inverse;
  bool exact;

  template <class T>
  static Divisor of(float size, T) {
    return {size, 1.f / size, sizeof(T) == sizeof(float) || !(size > 0x1p-100f && size < 0x1p100f)};
  }
  Vec operator()(Vec sum) const { return exact ? sum / size : sum * inverse; }
  Pair operator()(Pair sum) const { return {(*this)(sum.first), (*this)(sum.second)}; }
};

// One token more in a sum, or in a maximum that keeps a NaN.
template <bool kMaximum>
inline Vec joined(Vec acc, Vec x, float w) {
  if (!kMaximum) return acc + x * w;
  const IntVec wins = (x > acc) | (x != x);
  return wins ? x : acc;
}
template <bool kMaximum>
inline Pair joined(Pair acc, Pair x, float w) {
  return {joined<kMaximum>(acc.first, x.first, w), joined<kMaximum>(acc.second, x.second, w)};
}
template <bool kMaximum>
inline Vec begun(Vec x, float w) {
  return kMaximum ? x : x * w;
}
template <bool kMaximum>
inline Pair begun(Pair x, float w) {
  return {begun<kMaximum>(x.first, w), begun<kMaximum>(x.second, w)};
}

// One step over M tokens of a group, in order; `first` and `last` say where in the group. Between the steps acc lies in
// L1. `ahead` are the rows of the next step, on their way from L3 or memory while this one runs.
template <int M, bool kMaximum, class T>
inline void merge_step(const T* const* x, const T* const* ahead, const float* w, bool first, bool last, Divisor divisor,
                       int64_t count, float* acc, T* y) {
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
#pragma GCC unroll 8
    for (int m = 0; m < kMergeRows; ++m) {
      __builtin_prefetch(ahead[m] + c);
      if (2 * kLanes * sizeof(T) > 64) __builtin_prefetch(ahead[m] + c + kLanes);
    }
    Pair sum = first ? begun<kMaximum>(load_pair(x[0] + c), w[0])
                     : joined<kMaximum>(load_pair(acc + c), load_pair(x[0] + c), w[0]);
#pragma GCC unroll 8
    for (int m = 1; m < M; ++m) sum = joined<kMaximum>(sum, load_pair(x[m] + c), w[m]);
    if (last) {
      store_pair(y + c, kMaximum ? sum : divisor(sum));
    } else {
      store_pair(acc + c, sum);
    }
  }
  for (; c < count; c += kLanes) {
    const int64_t lanes = count - c < kLanes ? count - c : kLanes;
    Vec sum = begun<kMaximum>(load_first(x[0] + c, lanes), w[0]);
    if (!first) sum = joined<kMaximum>(load(acc + c), load_first(x[0] + c, lanes), w[0]);
    for (int m = 1; m < M; ++m) sum = joined<kMaximum>(sum, load_first(x[m] + c, lanes), w[m]);
    if (last) {
      store_first(y + c, kMaximum ? sum : divisor(sum), lanes);
    } else {
      store(acc + c, sum);
    }
  }
}

// Calls body(worker, row, piece, column, count) for blocks of kMergeColumns channels of every output row, row after
// row.
template <class Body>
inline void for_row_blocks(int threads, const TokenRows& rows, int64_t num_out, const Body& body) {
  const int64_t blocks = (rows.width + kMergeColumns - 1) / kMergeColumns;
  run_tasks(threads, num_out * rows.shuffle * rows.shuffle * blocks, [&](int worker, int64_t task) {
    const int64_t part = task / num_out, row = task - part * num_out;
    const int64_t piece = part / blocks, column = (part - piece * blocks) * kMergeColumns;
    body(worker, row, piece, column, rows.width - column < kMergeColumns ? rows.width - column : kMergeColumns);
  });
}

template <bool kMaximum, class T>
void merge_of(const MergeArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  const TokenPointer<const T> tokens{args.rows, static_cast<const T*>(args.x)};
  const int64_t width = args.rows.width, num_members = group_start[args.num_out];
  for_row_blocks(args.threads, args.rows, args.num_out,
                 [&](int worker, int64_t row, int64_t piece, int64_t column, int64_t count) {
                   float* acc = scratch + worker * kMergeColumns;
                   T* y = static_cast<T*>(args.y) + (row * tokens.pieces() + piece) * width + column;
                   const int64_t start = group_start[row], end = group_start[row + 1];
                   const float size = args.size == nullptr ? 1.f : args.size[row];
                   if (start == end || size == 0.f) {
                     __builtin_memset(y, 0, count * sizeof(T));
                     return;
                   }
                   const Divisor divisor = Divisor::of(args.reduction == Reduction::kMean ? size : 1.f, T{});
                   const T *x[kMergeRows], *ahead[kMergeRows];
                   float w[kMergeRows];
                   const auto row_of = [&](int64_t i) {
                     return tokens(member[i < num_members ? i : start], piece) + column;
                   };
                   for (int q = 0; q < kMergeRows; ++q) ahead[q] = row_of(start + q);
                   for (int64_t i = start; i < end; i += kMergeRows) {
                     const int64_t m = end - i < kMergeRows ? end - i : kMergeRows;
                     for (int q = 0; q < kMergeRows; ++q) {
                       x[q] = ahead[q];
                       w[q] = args.weight == nullptr || q >= m ? 1.f : args.weight[member[i + q]];
                     }
                     // Groups are neighbours in `member`: what follows the last token of this one is what the next one
                     // starts with.
                     for (int q = 0; q < kMergeRows; ++q) ahead[q] = row_of(i + m + q);
                     const bool first = i == start, last = i + m == end;
                     switch (m) {
                       case 1:
                         merge_step<1, kMaximum>(x, ahead, w, first, last, divisor, count, acc, y);
                         break;
                       case 2:
                         merge_step<2, kMaximum>(x, ahead, w, first, last, divisor, count, acc, y);
                         break;
                       case 3:
                         merge_step<3, kMaximum>(x, ahead, w, first, last, divisor, count, acc, y);
                         break;
                       default:
                         merge_step<4, kMaximum>(x, ahead, w, first, last, divisor, count, acc, y);
                         break;
                     }
                   }
                 });
}

template <class T>
void merge_rows_of(const MergeArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  if (args.reduction == Reduction::kMax) return merge_of<true, T>(args, group_start, member, scratch);
  return merge_of<false, T>(args, group_start, member, scratch);
}

void merge(const MergeArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  if (args.dtype == DType::kFloat32) return merge_rows_of<float>(args, group_start, member, scratch);
  if (args.dtype == DType::kBFloat16) return merge_rows_of<BFloat16>(args, group_start, member, scratch);
  return merge_rows_of<Float16>(args, group_start, member, scratch);
}

// left holds a gradient until a token takes it; what the first token takes is 0 for all after it.
template <class T>
inline void take_gradient(const T* x, const T* y, int64_t count, float* left, T* dx) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t lanes = count - c < kLanes ? count - c : kLanes;
    const Vec value = load_first(x + c, lanes), best = load_first(y + c, lanes), gradient = load(left + c);
    const IntVec attains = (value == best) | ((value != value) & (best != best));
    store_first(dx + c, attains ? gradient : Vec{}, lanes);
    store(left + c, attains ? Vec{} : gradient);
  }
}

template <class T>
void max_backward_of(const MaxBackwardArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  const TokenPointer<const T> tokens{args.rows, static_cast<const T*>(args.x)};
  const TokenPointer<T> gradients{args.dx_rows, static_cast<T*>(args.dx)};
  for_row_blocks(args.threads, args.rows, args.num_out,
                 [&](int worker, int64_t row, int64_t piece, int64_t column, int64_t count) {
                   float* left = scratch + worker * kMergeColumns;
                   const int64_t at = (row * tokens.pieces() + piece) * args.rows.width + column;
                   const T* grad = static_cast<const T*>(args.grad) + at;
                   for (int64_t c = 0; c < count; c += kLanes) {
                     store(left + c, load_first(grad + c, count - c < kLanes ? count - c : kLanes));
                   }
                   for (int64_t i = group_start[row]; i < group_start[row + 1]; ++i) {
                     take_gradient(tokens(member[i], piece) + column, static_cast<const T*>(args.y) + at, count, left,
                                   gradients(member[i], piece) + column);
                   }
                 });
}

void max_backward(const MaxBackwardArgs& args, const int64_t* group_start, const int64_t* member, float* scratch) {
  if (args.dtype == DType::kFloat32) return max_backward_of<float>(args, group_start, member, scratch);
  if (args.dtype == DType::kBFloat16) return max_backward_of<BFloat16>(args, group_start, member, scratch);
  return max_backward_of<Float16>(args, group_start, member, scratch);
}
