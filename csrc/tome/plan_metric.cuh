// SPDX-License-Identifier: Apache-2.0
// The stages of the matching schedule that touch the metric: unit vectors before the match, weighted means after it.
// Each loads several rows at once, since one warp that waits for one row after the other would leave memory idle.
#pragma once
#include "plan_state.cuh"

namespace lrc {
namespace {

/// List positions that one warp sums up. A group that covers several of these is added up from their sums, so that a
/// hub of half the tokens is no longer a chain than any other.
constexpr int kChunk = 32;
/// Tokens whose metric a warp loads at once.
constexpr int kRowsAtOnce = 4;
/// Channels of each of them that a lane loads at once.
constexpr int kPerLane = 4;

/// A power of two that brings the number of these bits near 1, so that squares neither overflow nor vanish.
__device__ float power_near_one_over(uint32_t magnitude) {
  const int exponent = static_cast<int>(magnitude >> 23);
  return exponent == 255 ? 1.0f : __uint_as_float(static_cast<uint32_t>(max(1, 254 - exponent)) << 23);
}

/// The norm of a token's metric times a power of two, and that power: 1, but where squares overflow or vanish.
struct Norm {
  float value;
  float scale;
};

/// A warp per kRowsAtOnce tokens: the norms of their metric after `rounded`.
template <typename Round>
__device__ void find_norms(const float* const (&source)[kRowsAtOnce], int num_channels, Round&& rounded,
                           Norm (&norms)[kRowsAtOnce]) {
  const int lane = threadIdx.x % 32;
  const auto square = [&](bool scaled) {
    float squares[kRowsAtOnce] = {};
    for (int k = lane; k < num_channels; k += 32) {
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const float value = scaled ? rounded(source[j][k]) * norms[j].scale : rounded(source[j][k]);
        squares[j] += value * value;
      }
    }
    bool extreme = false;
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        squares[j] += __shfl_xor_sync(0xFFFFFFFFu, squares[j], distance);
      }
      norms[j].value = rounded(sqrtf(squares[j]));
      extreme = extreme || !(squares[j] > 1e-24f && squares[j] < 1e24f);
    }
    return extreme;
  };
#pragma unroll
  for (int j = 0; j < kRowsAtOnce; ++j) norms[j].scale = 1.0f;
  // The lanes agree. Scaling moves the exponent alone, so that ordinary rows beside an extreme one keep their bits.
  if (!square(false)) return;
#pragma unroll
  for (int j = 0; j < kRowsAtOnce; ++j) {
    uint32_t largest = 0;
    for (int k = lane; k < num_channels; k += 32) {
      largest = max(largest, __float_as_uint(rounded(source[j][k])) & 0x7FFFFFFFu);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    }
    norms[j].scale = power_near_one_over(largest);
  }
  square(true);
}

/// A warp per kRowsAtOnce tokens: their unit vectors in 16-bit parts, and their flags.
template <typename T>
__device__ void write_units(const Team& team, const Segment& s, int num_channels, int row_words, uint32_t* vectors,
                            uint8_t* state, bool isolate) {
  const auto rounded = [](float value) { return kParts<T> == 2 ? value : to_float(from_float<T>(value)); };
  const int lane = threadIdx.x % 32;
  for (int first = team.warp() * kRowsAtOnce; first < s.n; first += team.warps() * kRowsAtOnce) {
    const float* source[kRowsAtOnce];
    Norm norms[kRowsAtOnce];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) source[j] = s.metric + s.token(min(first + j, s.n - 1)) * s.metric_stride;
    find_norms(source, num_channels, rounded, norms);
    const int mine = first + lane;
    if (lane < kRowsAtOnce && mine < s.n) {
      float norm = 0.0f;
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) norm = lane == j ? norms[j].value : norm;
      const bool healthy = norm > 0.0f && norm < INFINITY, shielded = s.is_protected && s.is_protected[s.token(mine)];
      state[mine] = static_cast<uint8_t>((healthy ? kHealthy : 0) | (shielded ? kProtected : 0));
    }
    for (int k = lane; k < row_words; k += 32) {
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        if (first + j >= s.n) break;
        const Norm norm = norms[j];
        const bool live = k < num_channels && ((norm.value > 0.0f && norm.value < INFINITY) || !isolate);
        const float unit = live ? rounded(source[j][k]) * norm.scale / norm.value : 0.0f;
        auto* const target = reinterpret_cast<T*>(vectors + int64_t{first + j} * row_words);
        if constexpr (kParts<T> == 2) {
          const T high = from_float<T>(unit * kPairScale);
          target[k] = high;
          target[row_words + k] = from_float<T>(unit * kPairScale - to_float(high));
        } else {
          target[k] = from_float<T>(unit);
        }
      }
    }
  }
}

/// A warp per chunk of the list: weighted sums of the metric over each partner's tokens in it, in ascending order, left
/// at the place of the first of them. `sums` null: only the weights are added.
__device__ void sum_chunks(const Team& team, const Segment& s, const Workspace& w, int merging, int num_channels,
                           float* sums, int stride) {
  constexpr int kInFlight = 8;
  const int lane = threadIdx.x % 32;
  const int channels = sums ? num_channels : 0;
  for (int start = team.warp() * kChunk; start < merging; start += team.warps() * kChunk) {
    const int live = min(kChunk, merging - start), at = start + min(lane, live - 1);
    const int lane_token = w.list_token[at], lane_row = w.list_row[at];
    const float lane_weight = w.list_weight[at];
    for (int k = 0; k == 0 || k < channels; k += 32 * kPerLane) {
      float acc[kPerLane] = {}, total = 0.0f;
      int first = start;
      for (int i = 0; i < live; i += kInFlight) {
        float values[kInFlight][kPerLane];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const float* const source = s.metric + __shfl_sync(0xFFFFFFFFu, lane_token, i + j) * s.metric_stride;
#pragma unroll
          for (int v = 0; v < kPerLane; ++v) {
            const int c = k + lane + 32 * v;
            values[j][v] = c < channels ? source[c] : 0.0f;
          }
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const float weight = __shfl_sync(0xFFFFFFFFu, lane_weight, i + j);
          const int row = __shfl_sync(0xFFFFFFFFu, lane_row, i + j);
          const int next = __shfl_sync(0xFFFFFFFFu, lane_row, min(i + j + 1, kChunk - 1));
          if (i + j >= live) continue;
          total += weight;
          // A token of weight 0 may hold NaN, and 0 * NaN would reach its group.
#pragma unroll
          for (int v = 0; v < kPerLane; ++v) acc[v] += weight == 0.0f ? 0.0f : values[j][v] * weight;
          if (i + j + 1 < live && next == row) continue;
#pragma unroll
          for (int v = 0; v < kPerLane; ++v) {
            const int c = k + lane + 32 * v;
            if (c < channels) sums[int64_t{first} * stride + c] = acc[v];
            acc[v] = 0.0f;
          }
          if (k == 0 && lane == 0) w.list_size[first] = total;
          total = 0.0f;
          first = start + i + j + 1;
        }
      }
    }
  }
}

/// Where the rows of the next iteration go; metric null: nothing reads it any more.
struct NextRows {
  float* metric;
  int64_t stride;
  float* size;
  int32_t* anchor;
  uint8_t* is_protected;
};

/// A warp per 32 set positions: the rows of the next iteration that come from them, each the weighted mean of its own
/// and its list's metric. What describes a row is loaded by one lane each, so that several rows' metric is in flight.
__device__ void write_rows(const Team& team, const Segment& s, const Workspace& w, int num_channels, const float* sums,
                           const NextRows& next) {
  constexpr uint32_t kAll = 0xFFFFFFFFu;
  const int lane = threadIdx.x % 32;
  for (int start = team.warp() * 32; start < s.n; start += team.warps() * 32) {
    const int i = start + lane, b = i - s.n_a;
    const bool stays = i < s.n && (b >= 0 || w.list_key[i] == kNoKey);
    const int token = s.token(min(i, s.n - 1));
    const int row = stays ? w.new_row[token] : 0;
    const int first = stays && b >= 0 ? w.list_first[b] : 0, end = stays && b >= 0 ? w.list_end[b] : 0;
    const float own = s.weight(token);
    float total = own;
#pragma unroll 4
    for (int p = first; p < end; p = (p / kChunk + 1) * kChunk) total += w.list_size[p];
    if (stays) {
      next.size[row] = total;
      next.anchor[row] = s.anchor ? s.anchor[token] : token;
      if (s.is_protected) next.is_protected[row] = s.is_protected[token];
    }
    const uint32_t staying = __ballot_sync(kAll, stays);
    for (int j = 0; next.metric && j < 32; j += kRowsAtOnce) {
      if (!(staying >> j & ((1u << kRowsAtOnce) - 1))) continue;
      for (int k = lane; k < (num_channels + 31) / 32 * 32; k += 32 * kPerLane) {
        float values[kRowsAtOnce][kPerLane], others[kRowsAtOnce][kPerLane];
#pragma unroll
        for (int q = 0; q < kRowsAtOnce; ++q) {
          const float* const mine = s.metric + __shfl_sync(kAll, token, j + q) * s.metric_stride;
          const int p = __shfl_sync(kAll, first, j + q), p_end = __shfl_sync(kAll, end, j + q);
#pragma unroll
          for (int v = 0; v < kPerLane; ++v) {
            const int c = k + 32 * v;
            values[q][v] = c < num_channels && staying >> (j + q) & 1 ? mine[c] : 0.0f;
            others[q][v] = c < num_channels && p < p_end ? sums[p * next.stride + c] : 0.0f;
          }
        }
#pragma unroll
        for (int q = 0; q < kRowsAtOnce; ++q) {
          const float weight = __shfl_sync(kAll, own, j + q), all = __shfl_sync(kAll, total, j + q);
          const int p_first = __shfl_sync(kAll, first, j + q), p_end = __shfl_sync(kAll, end, j + q);
          float* const target = next.metric + __shfl_sync(kAll, row, j + q) * next.stride;
          if (!(staying >> (j + q) & 1)) continue;
#pragma unroll
          for (int v = 0; v < kPerLane; ++v) {
            const int c = k + 32 * v;
            if (c >= num_channels) break;
            float sum = (weight == 0.0f ? 0.0f : values[q][v] * weight) + others[q][v];
#pragma unroll 4
            for (int p = (p_first / kChunk + 1) * kChunk; p < p_end; p += kChunk) sum += sums[p * next.stride + c];
            target[c] = all == 0.0f ? 0.0f : sum / all;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace lrc
