// SPDX-License-Identifier: Apache-2.0
// The whole matching schedule of a segment in one launch. A team of 1 to 8 blocks (a cluster) owns a segment and goes
// through all of its iterations: unit vectors, best partners, ranks, merged metric, and where every original token now
// lies. Between iterations nothing returns to the host and no other segment is waited for.
//
// What a team writes for itself lies in global memory and, being read again at once, in L2: the code is the same for
// any length of a segment and any size of the team. Every sum runs in an order that the segment's own tokens fix, so
// the result depends neither on the team nor on the other segments. There are no atomics.
#include "lrc/tome.h"
#include "plan_metric.cuh"

namespace lrc {
namespace {

constexpr int kMaxTeam = 8;
/// Keys that a block compares with at once.
constexpr int kKeyTile = 1024;

/// 32-bit keys that order scores: NaN above all, then from +inf down to -inf, -0 as 0.
__device__ uint32_t score_order(float score) {
  if (score != score) return 0xFFFFFFFFu;
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// Calls visit(i, number of keys below keys[i]) for each i < n, on some thread of the team. The keys to count differ.
template <typename Visit>
__device__ void count_below(const Team& team, const uint64_t* keys, int n, unsigned char* shared, Visit&& visit) {
  auto* const tile = reinterpret_cast<uint64_t*>(shared);
  for (int first = team.rank * kThreads; first < n; first += team.threads()) {
    const int i = first + static_cast<int>(threadIdx.x);
    const uint64_t mine = i < n ? keys[i] : 0;
    int below = 0;
    for (int start = 0; start < n; start += kKeyTile) {
      const int live = min(kKeyTile, n - start);
      __syncthreads();
      for (int k = threadIdx.x; k < (live + 1) / 2 * 2; k += kThreads) tile[k] = k < live ? keys[start + k] : kNoKey;
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < live; k += 2) {
        const auto two = *reinterpret_cast<const Vector<uint64_t, 2>*>(tile + k);
        below += (two.data[0] < mine) + (two.data[1] < mine);
      }
    }
    if (i < n) visit(i, below);
  }
  __syncthreads();
}

/// Set order where `destination` chooses set B: A, then B, each ascending. By the first block; returns |A| on every
/// one.
__device__ int order_by_destination(const Team& team, const uint8_t* destination, int n, int32_t* order,
                                    unsigned char* shared) {
  auto* const totals = reinterpret_cast<int*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int n_a = 0;
  for (int start = 0; start < n; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    n_a += __syncthreads_count(i < n && !destination[i]);
  }
  if (team.rank != 0) return n_a;
  int before_a = 0;
  for (int start = 0; start < n; start += kThreads) {
    const int i = start + static_cast<int>(threadIdx.x);
    const bool source = i < n && !destination[i];
    const uint32_t votes = __ballot_sync(0xFFFFFFFFu, source);
    if (lane == 0) totals[warp] = __popc(votes);
    __syncthreads();
    int rank = before_a + __popc(votes & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      rank += w < warp ? totals[w] : 0;
      before_a += totals[w];
    }
    if (i < n) order[source ? rank : n_a + i - rank] = i;
    __syncthreads();
  }
  return n_a;
}

/// Where no token of B may receive a token of A, it goes to the next one that is not protected, or else to the last.
__device__ void find_neighbours(const Team& team, const Segment& s, const Workspace& w) {
  for (int i = team.thread(); i < s.n_a; i += team.threads()) {
    if (w.score[i] != -INFINITY) continue;
    int j = i;
    if (s.order) {
      j = 0;
      for (int end = s.n_b; j < end;) {
        const int middle = (j + end) / 2;
        if (s.order[s.n_a + middle] < s.order[i]) {
          j = middle + 1;
        } else {
          end = middle;
        }
      }
    }
    while (j < s.n_b && w.state[s.n_a + j] & kProtected) ++j;
    if (j >= s.n_b) {
      for (j = s.n_b - 1; j >= 0 && w.state[s.n_a + j] & kProtected;) --j;
    }
    if (j >= 0) w.partner[i] = j;
  }
}

/// new_row of every token, the keys that order the list of merging tokens, and empty lists; returns how many merge.
__device__ int rank_tokens(const Team& team, const Segment& s, const Workspace& w, int r, const PlanArgs& args,
                           unsigned char* shared) {
  int merging = r;
  if (args.has_threshold) {
    int eligible = 0;
    for (int start = 0; start < s.n_a; start += kThreads) {
      const int i = start + static_cast<int>(threadIdx.x);
      eligible += __syncthreads_count(i < s.n_a && !(w.state[i] & kProtected) && w.score[i] >= args.threshold);
    }
    merging = min(r, eligible);
  }
  const int unmerged = s.n_a - merging;
  const auto place = [&](int i, int rank) {
    const int token = s.token(i);
    const bool merges = rank < merging;
    const int row = merges ? unmerged + w.partner[i] : rank - merging;
    const bool masked = merges && args.isolate && !(w.state[i] & kHealthy);
    w.new_row[token] = masked ? -1 - row : row;
    w.list_key[i] = merges ? static_cast<uint64_t>(w.partner[i]) << 32 | static_cast<uint32_t>(i) : kNoKey;
  };
  for (int j = team.thread(); j < s.n_b; j += team.threads()) {
    w.new_row[s.token(s.n_a + j)] = unmerged + j;
    w.list_first[j] = w.list_end[j] = 0;
  }
  if (unmerged == 0) {
    for (int i = team.thread(); i < s.n_a; i += team.threads()) place(i, 0);
    return merging;
  }
  for (int i = team.thread(); i < s.n_a; i += team.threads()) {
    const uint64_t last = w.state[i] & kProtected ? uint64_t{1} << 63 : 0;
    w.rank_key[i] = last | static_cast<uint64_t>(~score_order(w.score[i])) << 31 | static_cast<uint32_t>(i);
  }
  team.barrier();
  count_below(team, w.rank_key, s.n_a, shared, place);
  return merging;
}

/// The merging tokens in the order of their partners, and then which part of that list belongs to each of these.
__device__ void list_merging(const Team& team, const Segment& s, const Workspace& w, int merging,
                             unsigned char* shared) {
  count_below(team, w.list_key, s.n_a, shared, [&](int i, int position) {
    if (w.list_key[i] == kNoKey) return;
    const int token = s.token(i);
    w.list_token[position] = token;
    w.list_row[position] = w.partner[i];
    w.list_weight[position] = w.new_row[token] < 0 ? 0.0f : s.weight(token);
  });
  team.barrier();
  for (int i = team.thread(); i < merging; i += team.threads()) {
    const int row = w.list_row[i];
    if (i == 0 || w.list_row[i - 1] != row) w.list_first[row] = i;
    if (i + 1 == merging || w.list_row[i + 1] != row) w.list_end[row] = i + 1;
  }
}

/// The packed rows of a segment, and which of them every original token is in.
__device__ void write_plan(const Team& team, const Segment& s, const Workspace& w, const PlanArgs& args,
                           int64_t segment, int length, int32_t* assign, unsigned char* shared) {
  const int first = args.cu_seqlens_out[segment];
  const int capacity = args.cu_seqlens_out[segment + 1] - first;
  const auto write = [&](int i, int position) {
    w.new_row[i] = position;
    if (position >= capacity) return;
    const int64_t row = int64_t{first} + position;
    args.size_out[row] = s.weight(i);
    args.anchor[row] = s.anchor ? s.anchor[i] : i;
    args.valid[row] = 1;
  };
  if (args.position_order && s.anchor) {
    for (int i = team.thread(); i < s.n; i += team.threads()) w.rank_key[i] = static_cast<uint64_t>(s.anchor[i]);
    team.barrier();
    count_below(team, w.rank_key, s.n, shared, write);
  } else {
    for (int i = team.thread(); i < s.n; i += team.threads()) write(i, i);
  }
  for (int i = s.n + team.thread(); i < capacity; i += team.threads()) {
    const int64_t row = int64_t{first} + i;
    args.size_out[row] = 0.0f;
    args.anchor[row] = 0;
    args.valid[row] = 0;
  }
  team.barrier();
  for (int i = team.thread(); i < length; i += team.threads()) assign[i] = first + w.new_row[assign[i]];
}

/// One iteration, in which r tokens merge at most; returns how many did. `vectors` holds the unit vectors and then,
/// where next.metric is not null, the same memory the next metric.
template <int STEPS, typename T>
__device__ int iterate(const Team& team, const Segment& s, const Workspace& w, const PlanArgs& args, int r,
                       uint32_t* vectors, const NextRows& next, unsigned char* shared) {
  const int row_words = static_cast<int>(next.stride), num_channels = static_cast<int>(args.num_channels);
  write_units<T>(team, s, num_channels, row_words, vectors, w.state, args.isolate);
  team.barrier();
  const Units units = {vectors, w.state, row_words, row_words / 16, s.n_a, s.n_b};
  for (int row = team.rank * kTileA; row < s.n_a; row += team.size * kTileA) {
    match_rows<STEPS, T>(units, args.isolate, shared, row, w.score, w.partner);
  }
  team.barrier();
  find_neighbours(team, s, w);
  team.barrier();
  const int merging = rank_tokens(team, s, w, r, args, shared);
  team.barrier();
  list_merging(team, s, w, merging, shared);
  float* const sums = next.metric ? next.metric + (s.n - merging) * next.stride : nullptr;
  sum_chunks(team, s, w, merging, num_channels, sums, row_words);
  team.barrier();
  write_rows(team, s, w, num_channels, sums, next);
  return merging;
}

/// Grid: `team` neighbouring blocks per segment.
template <int STEPS, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    plan_merge_kernel(const PlanArgs args, const Workspace whole, const int row_words) {
  LRC_DYNAMIC_SHARED(unsigned char, shared);
  const Team team = {static_cast<int>(args.team), static_cast<int>(blockIdx.x % args.team)};
  const int64_t segment = blockIdx.x / args.team, start = args.cu_seqlens_in[segment];
  const int length = args.cu_seqlens_in[segment + 1] - static_cast<int>(start);
  const int num_channels = static_cast<int>(args.num_channels);
  // In shared memory, since so many pointers would fill the registers.
  Workspace& w = *reinterpret_cast<Workspace*>(shared + kSharedBytes);
  if (threadIdx.x == 0) w = of_segment(whole, start, row_words);
  __syncthreads();
  int32_t* const assign = args.assign + start;
  float* const weight = args.weight + start;
  Segment s = {length, 0, 0, args.metric + start * num_channels, num_channels, nullptr, nullptr, nullptr, nullptr};
  if (args.size) s.size = args.size + start;
  if (args.is_protected) s.is_protected = args.is_protected + start;
  for (int i = team.thread(); i < length; i += team.threads()) {
    assign[i] = i;
    weight[i] = s.weight(i);
  }
  int live = static_cast<int>(args.num_iterations), done = 0;
  while (live > 0 && args.r[(live - 1) * args.num_segments + segment] <= 0) --live;
  for (int iteration = 0; iteration < live; ++iteration) {
    s.n_a = (s.n + 1) / 2;
    if (args.destination) {
      s.n_a = order_by_destination(team, args.destination + start, s.n, w.order, shared);
      s.order = w.order;
      team.barrier();
    }
    s.n_b = s.n - s.n_a;
    const int r = min(args.r[iteration * args.num_segments + segment], s.n_b > 0 ? s.n_a : 0);
    if (r <= 0) continue;
    const int64_t side = done % 2 * args.num_tokens;
    uint32_t* const vectors = w.vectors + side * row_words;
    auto* const metric = reinterpret_cast<float*>(vectors);
    const bool last = iteration + 1 == live;
    const NextRows next = {last ? nullptr : metric, row_words, w.size + side, w.anchor + side, w.is_protected + side};
    const int merging = iterate<STEPS, T>(team, s, w, args, r, vectors, next, shared);
    for (int i = team.thread(); i < length; i += team.threads()) {
      const int row = w.new_row[assign[i]];
      if (row < 0) weight[i] = 0.0f;
      assign[i] = row < 0 ? -1 - row : row;
    }
    team.barrier();
    s.n -= merging;
    s.metric = metric;
    s.metric_stride = row_words;
    s.size = next.size;
    s.anchor = next.anchor;
    if (s.is_protected) s.is_protected = next.is_protected;
    ++done;
  }
  write_plan(team, s, w, args, segment, length, assign, shared);
}

void check_plan(const PlanArgs& args) {
  check_at_least("num_tokens", args.num_tokens, 0);
  check_at_least("num_channels", args.num_channels, 1);
  require(args.num_channels < 1 << 20, "num_channels must be < 2^20, got " + std::to_string(args.num_channels));
  check_at_least("num_segments", args.num_segments, 0);
  check_at_least("num_iterations", args.num_iterations, 0);
  check_at_least("max_seqlen", args.max_seqlen, 0);
  require(args.max_seqlen <= kMaxPlanTokens,
          "max_seqlen must be <= " + std::to_string(kMaxPlanTokens) + ", got " + std::to_string(args.max_seqlen));
  require(args.team == 1 || args.team == 2 || args.team == 4 || args.team == kMaxTeam,
          "team must be 1, 2, 4 or 8, got " + std::to_string(args.team));
  require(!args.destination || args.num_iterations <= 1,
          "destination fixes set B of one iteration, got " + std::to_string(args.num_iterations));
  const int64_t wanted = plan_workspace_bytes(args.num_tokens, args.num_channels);
  require(args.workspace_bytes >= wanted,
          "workspace must have " + std::to_string(wanted) + " bytes, got " + std::to_string(args.workspace_bytes));
  require(args.num_tokens == 0 || is_aligned(args.workspace, 256), "workspace must be aligned to 256 bytes");
}

}  // namespace

int64_t plan_workspace_bytes(int64_t num_tokens, int64_t num_channels) {
  Workspace unused = {};
  return carve(unused, nullptr, num_tokens, num_channels);
}

void plan_merge(const PlanArgs& args, cudaStream_t stream) {
  check_plan(args);
  if (args.num_segments == 0 || args.num_tokens == 0) return;
  Workspace workspace = {};
  carve(workspace, args.workspace, args.num_tokens, args.num_channels);
  const int row_words = padded_channels(args.num_channels);
  // More than 64 channels: 8 steps of 16 in registers, which halves the passes over wider metrics.
  auto* kernel = args.bf16 ? plan_merge_kernel<8, __nv_bfloat16> : plan_merge_kernel<8, __half>;
  if (row_words <= 64) kernel = args.bf16 ? plan_merge_kernel<4, __nv_bfloat16> : plan_merge_kernel<4, __half>;
  const int bytes = kSharedBytes + static_cast<int>(sizeof(Workspace));
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "plan_merge");
  launch_clusters("plan_merge", kernel, grid_x(args.num_segments * args.team), dim3(kThreads),
                  static_cast<int>(args.team), bytes, stream, args, workspace, row_words);
}

}  // namespace lrc
