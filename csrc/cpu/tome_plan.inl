// SPDX-License-Identifier: Apache-2.0
// The matching of token merging: metric rows in, assignment out, the whole schedule of a segment in one call. Included
// by tome.inl inside the namespace of an instruction set.
//
// A row of the working set is never normalised or divided by its size: cosine similarity does not see the length, so a
// merged row is carried as sum(size * m) and only its copy in a panel has length 1.

// Tokens of set A times vectors of tokens of set B that one tile keeps in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 3;
#endif
constexpr int kPanel = kTileVectors * kLanes;

struct Row {
  const float* m;
  float scale;  // size * metric = scale * m: 1 for a sum of merged rows, 0 for a row without weight
  float size;
  int32_t anchor;
  bool is_protected;
};

struct Workspace {
  Row *rows, *next;
  int32_t *a, *b, *candidate, *partner, *order, *new_row, *best_column;
  float *score, *a_length, *b_length, *best, *panels, *sums, *units, *zeros;
  const float **a_row, **b_row;
  uint8_t *unhealthy, *masked, *a_protected;
  int64_t bytes;
};

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <class T>
inline void carve(char* base, int64_t* offset, int64_t count, T** out) {
  *out = reinterpret_cast<T*>(base + *offset);
  *offset += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
}

// `sums` and `units` have room for every row but are touched only where rows merge or have extreme lengths.
Workspace carve_workspace(char* base, int64_t n, int64_t channels) {
  Workspace ws;
  int64_t offset = 0;
  const int64_t padded_a = round_up(n, kTileRows);
  carve(base, &offset, n, &ws.rows);
  carve(base, &offset, n, &ws.next);
  int32_t** const lists[] = {&ws.a, &ws.b, &ws.candidate, &ws.partner, &ws.order, &ws.new_row};
  for (int32_t** list : lists) carve(base, &offset, n, list);
  carve(base, &offset, n, &ws.score);
  carve(base, &offset, n, &ws.a_length);
  carve(base, &offset, n, &ws.b_length);
  carve(base, &offset, padded_a * kLanes, &ws.best);
  carve(base, &offset, padded_a * kLanes, &ws.best_column);
  carve(base, &offset, padded_a, &ws.a_row);
  carve(base, &offset, n, &ws.b_row);
  uint8_t** const flags[] = {&ws.unhealthy, &ws.masked, &ws.a_protected};
  for (uint8_t** flag : flags) carve(base, &offset, n, flag);
  carve(base, &offset, channels + kLanes, &ws.zeros);
  carve(base, &offset, round_up(n, kPanel) * channels, &ws.panels);
  carve(base, &offset, n * channels, &ws.sums);
  carve(base, &offset, n * channels, &ws.units);
  ws.bytes = offset;
  return ws;
}

int64_t plan_workspace_bytes(int64_t max_seqlen, int64_t channels) {
  return carve_workspace(nullptr, max_seqlen, channels).bytes;
}

// |m|. Squares that leave the range of fp32 are summed in fp64.
inline double length_of(const float* m, int64_t channels) {
  Vec sum = {};
  int64_t k = 0;
  for (; k + kLanes <= channels; k += kLanes) sum += load(m + k) * load(m + k);
  if (k < channels) sum += load_first(m + k, channels - k) * load_first(m + k, channels - k);
  const float total = sum_lanes(sum);
  if (total > 0x1p-80f && total < 0x1p120f) return __builtin_sqrt(total);
  double exact = 0.;
  for (k = 0; k < channels; ++k) exact += static_cast<double>(m[k]) * m[k];
  return __builtin_sqrt(exact);
}

inline bool is_ordinary(double length) {
  return length > 0x1p-40 && length < 0x1p60;
}

// The tile's dot products against one panel update each row's best (value, column) per lane. A later column replaces an
// earlier one only if it is strictly better, so that ties go to the lowest column.
template <bool kRound>
inline void match_tile(const float* const* a, const float* panel, int64_t channels, int32_t column, float* best,
                       int32_t* best_column) {
  Vec dot[kTileRows][kTileVectors] = {};
  for (int64_t k = 0; k < channels; ++k) {
    Vec b[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) b[v] = load(panel + k * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int q = 0; q < kTileRows; ++q) {
      const Vec value = splat(a[q][k]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) dot[q][v] += value * b[v];
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kTileRows; ++q) {
    Vec top = load(best + q * kLanes);
    IntVec where;
    __builtin_memcpy(&where, best_column + q * kLanes, sizeof(where));
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      const Vec score = kRound ? round_to_bf16(dot[q][v]) : dot[q][v];
      const IntVec better = score > top;
      top = better ? score : top;
      where = better ? IntVec{} + (column + v * kLanes) : where;
    }
    store(best + q * kLanes, top);
    __builtin_memcpy(best_column + q * kLanes, &where, sizeof(where));
  }
}

// Rows of set A whose metric fits half of L2: they meet every panel before the next ones do.
inline int64_t rows_in_cache(int64_t channels) {
  constexpr int64_t kBytes = 1 << 19;
  const int64_t rows = kBytes / static_cast<int64_t>(sizeof(float)) / (channels > 0 ? channels : 1);
  return round_up(rows < 1 ? 1 : rows, kTileRows);
}

// score and partner (an index into set B) of the rows [first, last) of set A; `first` is a multiple of kTileRows.
void match_rows(const Workspace& ws, int64_t first, int64_t last, int64_t num_candidates, int64_t channels,
                bool round_to_bf16) {
  const int64_t padded = round_up(last, kTileRows);
  for (int64_t i = first * kLanes; i < padded * kLanes; ++i) {
    ws.best[i] = -__builtin_inff();
    ws.best_column[i] = 0;
  }
  const auto tile = round_to_bf16 ? match_tile<true> : match_tile<false>;
  for (int64_t column = 0; column < num_candidates; column += kPanel) {
    const float* panel = ws.panels + column * channels;
    for (int64_t i = first; i < last; i += kTileRows) {
      tile(ws.a_row + i, panel, channels, static_cast<int32_t>(column), ws.best + i * kLanes,
           ws.best_column + i * kLanes);
    }
  }
  // The last panel is filled up with copies of its last column, which never win: ties go to the lowest column.
  for (int64_t i = first; i < last; ++i) {
    Vec top = load(ws.best + i * kLanes);
    IntVec column;
    __builtin_memcpy(&column, ws.best_column + i * kLanes, sizeof(column));
    column += lane_index();
#pragma GCC unroll 4
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const IntVec lanes = (lane_index() + step) & (kLanes - 1);
      const Vec other = shuffle(top, top, lanes);
      const IntVec other_column = shuffle(column, column, lanes);
      const IntVec better = (other > top) | ((other == top) & (other_column < column));
      top = better ? other : top;
      column = better ? other_column : column;
    }
    ws.score[i] = top[0] / ws.a_length[i];
    ws.partner[i] = ws.candidate[column[0]];
  }
}

// Sets of one iteration: what match_rows and the merge of an iteration share.
struct Sets {
  int64_t num_a, num_b, num_candidates;
};

// Panel p holds columns [p * kPanel, (p + 1) * kPanel) of set B, channel by channel, with length 1.
void pack_panels(const Workspace& ws, int64_t num_candidates, int64_t channels) {
  for (int64_t first = 0; first < round_up(num_candidates, kPanel); first += kLanes) {
    float* out = ws.panels + first / kPanel * kPanel * channels + first % kPanel;
    const float* m[kLanes];
    float inverse[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t column = first + lane < num_candidates ? first + lane : num_candidates - 1;
      m[lane] = ws.b_row[column];
      inverse[lane] = 1.f / ws.b_length[column];
    }
    int64_t k = 0;
    for (; k + kLanes <= channels; k += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) block[lane] = load(m[lane] + k);
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (k + i) * kPanel, block[i] * load(inverse));
    }
    for (; k < channels; ++k) {
      for (int lane = 0; lane < kLanes; ++lane) out[k * kPanel + lane] = m[lane][k] * inverse[lane];
    }
  }
}

// The row in bf16, divided by its length in bf16: its length is 1 from here on, or 0, infinite or NaN.
double round_row(const Workspace& ws, const Row& row, int64_t channels, float* unit) {
  // A sum of merged rows is carried undivided.
  const float size = row.m == ws.sums + row.anchor * channels ? row.size : 1.f;
  for (int64_t k = 0; k < channels; ++k) unit[k] = round_to_bf16(splat(row.m[k] / size))[0];
  const float length = round_to_bf16(splat(static_cast<float>(length_of(unit, channels))))[0];
  if (!(length > 0.f && length < __builtin_inff())) return length;
  for (int64_t k = 0; k < channels; ++k) unit[k] = round_to_bf16(splat(unit[k] / length))[0];
  return 1.;
}

// Splits the n rows into sets, measures them, and packs the healthy and open rows of set B.
Sets prepare(const Workspace& ws, int64_t n, const uint8_t* destination, int64_t channels, bool round_to_bf16) {
  Sets sets = {0, 0, 0};
  for (int64_t i = 0; i < n; ++i) {
    const bool in_b = destination == nullptr ? i % 2 == 1 : destination[i] != 0;
    const Row& row = ws.rows[i];
    const float* m = row.m;
    double length;
    if (round_to_bf16) {
      m = ws.units + i * channels;
      length = round_row(ws, row, channels, ws.units + i * channels);
    } else {
      length = length_of(m, channels);
    }
    // Rows without length and rows that are not finite: their length is 0, infinite or NaN.
    const bool unhealthy = !(length > 0. && length < __builtin_inf());
    ws.unhealthy[i] = unhealthy;
    if (unhealthy) {
      m = ws.zeros;
      length = 1.;
    } else if (!is_ordinary(length)) {
      float* unit = ws.units + i * channels;
      for (int64_t k = 0; k < channels; ++k) unit[k] = static_cast<float>(m[k] / length);
      m = unit;
      length = 1.;
    }
    if (in_b) {
      const int64_t b = sets.num_b++;
      ws.b[b] = static_cast<int32_t>(i);
      if (unhealthy || row.is_protected) continue;
      const int64_t column = sets.num_candidates++;
      ws.candidate[column] = static_cast<int32_t>(b);
      ws.b_row[column] = m;
      ws.b_length[column] = static_cast<float>(length);
    } else {
      const int64_t a = sets.num_a++;
      ws.a[a] = static_cast<int32_t>(i);
      ws.a_protected[a] = row.is_protected;
      ws.a_row[a] = m;
      ws.a_length[a] = static_cast<float>(length);
    }
  }
  for (int64_t a = sets.num_a; a < round_up(sets.num_a, kTileRows); ++a) ws.a_row[a] = ws.zeros;
  pack_panels(ws, sets.num_candidates, channels);
  return sets;
}

// Where rows without direction are not isolated, every score with one of them is NaN, which is the best score of all,
// and the first of those wins. Infinity stands for NaN: it ranks first as well.
void spread_nan(const Workspace& ws, const Sets& sets) {
  int64_t open = -1, nan = -1;
  for (int64_t b = sets.num_b - 1; b >= 0; --b) {
    if (ws.rows[ws.b[b]].is_protected) continue;
    open = b;
    if (ws.unhealthy[ws.b[b]]) nan = b;
  }
  for (int64_t i = 0; i < sets.num_a; ++i) {
    const int64_t partner = ws.unhealthy[ws.a[i]] ? open : nan;
    if (partner < 0) continue;
    ws.score[i] = __builtin_inff();
    ws.partner[i] = static_cast<int32_t>(partner);
  }
}

void match(const Workspace& ws, const Sets& sets, const PlanArgs& args, int threads) {
  const int64_t channels = args.num_channels;
  if (sets.num_candidates > 0 && sets.num_a > 0) {
    const int64_t share = round_up((sets.num_a + threads - 1) / threads, kTileRows), cached = rows_in_cache(channels);
    const int64_t chunk = share < cached ? share : cached;
    run_tasks(threads, (sets.num_a + chunk - 1) / chunk, [&](int, int64_t task) {
      const int64_t first = task * chunk, last = first + chunk < sets.num_a ? first + chunk : sets.num_a;
      match_rows(ws, first, last, sets.num_candidates, channels, args.round_to_bf16);
    });
  }
  // A row without any partner goes to the next open row of set B on its right, or else to the last one.
  int64_t right = 0, open = 0;
  for (int64_t i = 0; i < sets.num_a; ++i) {
    while (right < sets.num_b && (ws.b[right] < ws.a[i] || ws.rows[ws.b[right]].is_protected)) {
      if (!ws.rows[ws.b[right]].is_protected) open = right;
      ++right;
    }
    if (sets.num_candidates > 0 && !ws.unhealthy[ws.a[i]]) continue;
    ws.score[i] = -__builtin_inff();
    ws.partner[i] = static_cast<int32_t>(right < sets.num_b ? right : open);
  }
  if (!args.isolate) spread_nan(ws, sets);
}

inline void add_row(const Workspace& ws, const Row& from, int64_t channels, Row* into) {
  float* sum = ws.sums + into->anchor * channels;
  if (into->m == sum) {
    for (int64_t k = 0; k < channels; ++k) sum[k] += from.scale * from.m[k];
    return;
  }
  if (into->scale == 0.f) {
    for (int64_t k = 0; k < channels; ++k) sum[k] = from.scale * from.m[k];
  } else {
    for (int64_t k = 0; k < channels; ++k) sum[k] = into->scale * into->m[k] + from.scale * from.m[k];
  }
  into->m = sum;
  into->scale = 1.f;
}

// Merges up to r rows; returns how many rows are left. new_row and masked of every row tell what became of it.
int64_t merge_rows(const Workspace& ws, const Sets& sets, int64_t n, int64_t r, const PlanArgs& args) {
  if (r < sets.num_a || args.has_threshold) {
    rank_rows(ws.score, ws.a_protected, ws.order, sets.num_a);
  } else {
    for (int64_t i = 0; i < sets.num_a; ++i) ws.order[i] = static_cast<int32_t>(i);
  }
  int64_t merged = r;
  if (args.has_threshold) {
    merged = 0;
    for (int64_t i = 0; i < r; ++i) merged += ws.score[ws.order[i]] >= args.threshold;
  }
  const int64_t unmerged = sets.num_a - merged;
  for (int64_t i = 0; i < sets.num_b; ++i) {
    ws.new_row[ws.b[i]] = static_cast<int32_t>(unmerged + i);
    ws.next[unmerged + i] = ws.rows[ws.b[i]];
  }
  __builtin_memset(ws.masked, 0, n);
  for (int64_t i = 0; i < sets.num_a; ++i) {
    const int32_t a = ws.order[i], row = ws.a[a];
    if (i < merged) {
      ws.new_row[row] = static_cast<int32_t>(unmerged + ws.partner[a]);
      ws.masked[row] = args.isolate && ws.unhealthy[row];
    } else {
      ws.new_row[row] = static_cast<int32_t>(i - merged);
      ws.next[i - merged] = ws.rows[row];
    }
  }
  const int64_t left = n - merged;
  for (int64_t i = 0; i < left; ++i) ws.next[i].size = 0.f;
  for (int64_t i = 0; i < n; ++i) {
    Row& into = ws.next[ws.new_row[i]];
    if (ws.masked[i]) continue;
    into.size += ws.rows[i].size;
    if (ws.rows[i].anchor != into.anchor && ws.rows[i].scale != 0.f) add_row(ws, ws.rows[i], args.num_channels, &into);
  }
  for (int64_t i = 0; i < left; ++i) {
    if (ws.next[i].size != 0.f) continue;
    ws.next[i].m = ws.zeros;
    ws.next[i].scale = 0.f;
  }
  return left;
}

// Returns false where the rows that are left do not fit the segment's room in the output.
// metric: that of the segment.
bool plan_segment(const PlanArgs& args, int64_t segment, const float* metric, char* workspace, int64_t max_seqlen,
                  int threads) {
  const int64_t start = args.cu_seqlens_in[segment], n_in = args.cu_seqlens_in[segment + 1] - start;
  const int64_t first_out = args.cu_seqlens_out[segment], room = args.cu_seqlens_out[segment + 1] - first_out;
  Workspace ws = carve_workspace(workspace, max_seqlen, args.num_channels);
  int32_t* assign = args.assign + start;
  float* weight = args.weight + start;
  __builtin_memset(ws.zeros, 0, args.num_channels * sizeof(float));
  for (int64_t i = 0; i < n_in; ++i) {
    const float size = args.size == nullptr ? 1.f : args.size[start + i];
    const bool is_protected = args.is_protected != nullptr && args.is_protected[start + i] != 0;
    ws.rows[i] = {metric + i * args.num_channels, size, size, static_cast<int32_t>(i), is_protected};
    assign[i] = static_cast<int32_t>(i);
    weight[i] = size;
  }
  int64_t n = n_in;
  for (int64_t iteration = 0; iteration < args.num_iterations; ++iteration) {
    int64_t r = args.r[iteration * args.num_segments + segment];
    if (r == 0) continue;
    const uint8_t* destination = args.destination == nullptr ? nullptr : args.destination + start;
    const Sets sets = prepare(ws, n, destination, args.num_channels, args.round_to_bf16);
    r = r < sets.num_a ? r : sets.num_a;
    if (sets.num_b == 0) r = 0;
    match(ws, sets, args, threads);
    n = merge_rows(ws, sets, n, r, args);
    for (int64_t i = 0; i < n_in; ++i) {
      if (ws.masked[assign[i]]) weight[i] = 0.f;
      assign[i] = ws.new_row[assign[i]];
    }
    Row* previous = ws.rows;
    ws.rows = ws.next;
    ws.next = previous;
  }
  if (n > room) return false;
  if (args.position_order) {
    // Anchors are distinct: a mark per anchor sorts them.
    for (int64_t i = 0; i < n_in; ++i) ws.order[i] = -1;
    for (int64_t i = 0; i < n; ++i) ws.order[ws.rows[i].anchor] = static_cast<int32_t>(i);
    int64_t rank = 0;
    for (int64_t i = 0; i < n_in; ++i) {
      if (ws.order[i] < 0) continue;
      ws.new_row[ws.order[i]] = static_cast<int32_t>(rank);
      ws.next[rank++] = ws.rows[ws.order[i]];
    }
    for (int64_t i = 0; i < n_in; ++i) assign[i] = ws.new_row[assign[i]];
    ws.rows = ws.next;
  }
  for (int64_t i = 0; i < n_in; ++i) assign[i] += static_cast<int32_t>(first_out);
  for (int64_t i = 0; i < n; ++i) {
    args.size_out[first_out + i] = ws.rows[i].size;
    args.anchor[first_out + i] = ws.rows[i].anchor;
    if (args.valid != nullptr) args.valid[first_out + i] = 1;
  }
  return true;
}

int64_t longest_segment(const PlanArgs& args) {
  int64_t longest = 0;
  for (int64_t s = 0; s < args.num_segments; ++s) {
    const int64_t n = args.cu_seqlens_in[s + 1] - args.cu_seqlens_in[s];
    longest = n > longest ? n : longest;
  }
  return longest;
}

// body(worker, segment, threads) for each segment; returns one for which it was false, or -1. Few segments run one
// after the other and the threads share each of them. The bits are the same either way.
template <class Body>
int64_t run_segments(const PlanArgs& args, const Body& body) {
  const bool inner = args.num_segments < args.threads;
  int64_t failed = -1;
  run_tasks(inner ? 1 : args.threads, args.num_segments, [&](int worker, int64_t segment) {
    if (!body(worker, segment, inner ? args.threads : 1)) __atomic_store_n(&failed, segment, __ATOMIC_RELAXED);
  });
  return failed;
}

int64_t plan(const PlanArgs& args, char* workspace, int64_t stride) {
  const int64_t max_seqlen = longest_segment(args);
  return run_segments(args, [&](int worker, int64_t segment, int threads) {
    const float* metric = args.metric + args.cu_seqlens_in[segment] * args.num_channels;
    return plan_segment(args, segment, metric, workspace + worker * stride, max_seqlen, threads);
  });
}
