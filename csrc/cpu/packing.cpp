// SPDX-License-Identifier: Apache-2.0
// The strategies of the pack planner and the permutation that they walk. The names are those of
// lrc_kernels/packing/reference.py, which says what each strategy does.
#include "cpu/packing.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace lrc::cpu {
namespace {

constexpr int64_t kTaken = std::numeric_limits<int64_t>::max();
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
constexpr int kRounds = 8;
constexpr int64_t kPatience = 48;

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// A Feistel network over the fewest bits that hold n values, walked until it lands below n again.
class Permutation {
 public:
  Permutation(uint64_t n, uint64_t seed, uint64_t epoch, uint64_t stream) : n_(n) {
    int bits = 2;
    while (bits < 64 && (n - 1) >> bits != 0) ++bits;
    low_bits_ = bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
    const uint64_t state = mix(mix(mix(seed + kGolden) + epoch + kGolden) + stream + kGolden);
    for (int r = 0; r < kRounds; ++r) keys_[r] = mix(state + static_cast<uint64_t>(r + 1) * kGolden);
  }

  // Entries first .. first + count. A branch per entry would be mispredicted for each that lands outside, so the whole
  // stretch takes a step and only those outside take the next one.
  void write(int64_t first, int64_t count, int64_t* entries) const {
    uint64_t value[kStretch];
    int outside[kStretch];
    for (int64_t done = 0; done < count; done += kStretch) {
      const int size = static_cast<int>(std::min<int64_t>(kStretch, count - done));
      for (int i = 0; i < size; ++i) value[i] = encrypt(static_cast<uint64_t>(first + done + i));
      int num_outside = 0;
      for (int i = 0; i < size; ++i) {
        outside[num_outside] = i;
        num_outside += value[i] >= n_;
      }
      while (num_outside > 0) {
        int left = 0;
        for (int i = 0; i < num_outside; ++i) {
          const int at = outside[i];
          value[at] = encrypt(value[at]);
          outside[left] = at;
          left += value[at] >= n_;
        }
        num_outside = left;
      }
      for (int i = 0; i < size; ++i) entries[done + i] = static_cast<int64_t>(value[i]);
    }
  }

 private:
  static constexpr int kStretch = 256;

  uint64_t encrypt(uint64_t value) const {
    uint64_t low = value & low_mask_, high = value >> low_bits_;
    for (int r = 0; r < kRounds; r += 2) {
      low ^= mix(high + keys_[r]) & low_mask_;
      high ^= mix(low + keys_[r + 1]) & high_mask_;
    }
    return high << low_bits_ | low;
  }

  uint64_t n_, low_mask_, high_mask_, keys_[kRounds];
  int low_bits_;
};

struct Load {
  int64_t tokens = 0, frames = 0;
  double cost = 0;
};

class Planner {
 public:
  explicit Planner(const PackArgs& args)
      : args_(args), order_(new int64_t[args.num_kept]), pack_of_(new int64_t[args.num_kept]) {
    const Permutation permutation(args.num_samples, args.seed, args.epoch, 0);
    if (args.keep == nullptr) {
      permutation.write(0, args.num_samples, order_.get());
      return;
    }
    constexpr int64_t kStretch = 1024;
    int64_t kept = 0, entries[kStretch];
    for (int64_t first = 0; first < args.num_samples; first += kStretch) {
      const int64_t count = std::min(kStretch, args.num_samples - first);
      permutation.write(first, count, entries);
      for (int64_t i = 0; i < count; ++i) {
        if (!args.keep[entries[i]]) continue;
        if (kept == args.num_kept) throw std::invalid_argument("keep must hold num_kept samples, but holds more");
        order_[kept++] = entries[i];
      }
    }
    if (kept != args.num_kept) throw std::invalid_argument("keep must hold num_kept samples, but holds fewer");
  }

  // A sample that fits no pack would be waited for without end.
  void check_samples() const {
    for (int64_t i = 0; i < args_.num_samples; ++i) {
      if (args_.keep != nullptr && !args_.keep[i]) continue;
      if (args_.num_tokens[i] < 1 || args_.num_frames[i] < 0 ||
          !fits({}, {args_.num_tokens[i], args_.num_frames[i], args_.cost[i]})) {
        throw std::invalid_argument("every kept sample must fit a pack by itself, but sample " + std::to_string(i) +
                                    " does not");
      }
    }
  }

  void in_order() {
    for (int64_t arrival = 0; arrival < args_.num_kept; ++arrival) {
      const Load sample = load_of(arrival);
      if (arrival == 0 || !fits(packs_.back(), sample)) emit(open());
      place(arrival, sample, num_packs() - 1);
    }
  }

  void open_best_fit() {
    struct Open {
      int64_t pack, opened_at;  // opened_at: samples that had left by then
      double fullness;
    };
    std::vector<Open> open_packs;  // oldest first
    const auto fuller = [](const Open& a, const Open& b) { return a.fullness < b.fullness; };
    int64_t left = 0;
    for (int64_t arrival = 0; arrival < args_.num_kept; ++arrival) {
      const Load sample = load_of(arrival);
      auto best = open_packs.end();
      for (auto pack = open_packs.begin(); pack != open_packs.end(); ++pack) {
        const bool better = best == open_packs.end() || fuller(*best, *pack);
        if (better && fits(packs_[pack->pack], sample)) best = pack;
      }
      if (best == open_packs.end()) {
        if (static_cast<int64_t>(open_packs.size()) == args_.open_packs) {
          const auto oldest = open_packs.begin();
          const auto closing =
              left - oldest->opened_at >= kPatience ? oldest : std::max_element(oldest, open_packs.end(), fuller);
          emit(closing->pack);
          left += counts_[closing->pack];
          open_packs.erase(closing);
        }
        open_packs.push_back({open(), left, 0});
        best = open_packs.end() - 1;
      }
      best->fullness = fullness(place(arrival, sample, best->pack));
    }
    for (const Open& last : open_packs) emit(last.pack);
  }

  void first_fit() {
    // Arrivals in blocks with the fewest tokens of a waiting one, so that a search skips whole blocks.
    constexpr int64_t kBlock = 64;
    const int64_t n = args_.num_kept;
    std::vector<int64_t> waiting(n, kTaken), block_least((n + kBlock - 1) / kBlock, kTaken);
    int64_t admitted = 0, oldest = 0, num_waiting = 0;
    while (true) {
      for (; admitted < n && num_waiting < args_.window; ++admitted, ++num_waiting) {
        waiting[admitted] = load_of(admitted).tokens;
        block_least[admitted / kBlock] = std::min(block_least[admitted / kBlock], waiting[admitted]);
      }
      while (oldest < admitted && waiting[oldest] == kTaken) ++oldest;
      if (oldest == admitted) return;
      const int64_t pack = open();
      emit(pack);
      for (int64_t block = oldest / kBlock; block * kBlock < admitted; ++block) {
        if (block_least[block] > args_.max_tokens - packs_[pack].tokens) continue;
        const int64_t end = std::min(admitted, (block + 1) * kBlock);
        int64_t least = kTaken;
        for (int64_t arrival = block * kBlock; arrival < end; ++arrival) {
          if (waiting[arrival] <= args_.max_tokens - packs_[pack].tokens) {
            const Load sample = load_of(arrival);
            if (fits(packs_[pack], sample)) {
              place(arrival, sample, pack);
              waiting[arrival] = kTaken;
              --num_waiting;
            }
          }
          least = std::min(least, waiting[arrival]);
        }
        block_least[block] = least;
      }
    }
  }

  void best_fit() {
    std::set<std::pair<int64_t, int64_t>> waiting;  // (-tokens, arrival)
    int64_t admitted = 0, oldest = 0;
    const std::unique_ptr<bool[]> taken(new bool[args_.num_kept]());
    while (true) {
      for (; admitted < args_.num_kept && static_cast<int64_t>(waiting.size()) < args_.window; ++admitted) {
        waiting.emplace(-load_of(admitted).tokens, admitted);
      }
      while (oldest < admitted && taken[oldest]) ++oldest;
      if (oldest == admitted) return;
      const int64_t pack = open();
      emit(pack);
      const auto take = [&](int64_t arrival) {
        place(arrival, load_of(arrival), pack);
        taken[arrival] = true;
      };
      waiting.erase({-load_of(oldest).tokens, oldest});
      take(oldest);
      auto candidate = waiting.lower_bound({packs_[pack].tokens - args_.max_tokens, 0});
      while (candidate != waiting.end()) {
        if (!fits(packs_[pack], load_of(candidate->second))) {
          ++candidate;
          continue;
        }
        take(candidate->second);
        const auto next = waiting.erase(candidate);
        if (next == waiting.end()) break;
        // What did not fit before cannot fit now: the search goes on where it stood, or further on.
        candidate = waiting.lower_bound(std::max(*next, {packs_[pack].tokens - args_.max_tokens, 0}));
      }
    }
  }

  void best_fit_decreasing() {
    std::vector<std::pair<int64_t, int64_t>> by_size;  // (-tokens, arrival)
    std::vector<std::pair<int64_t, int64_t>> opened;   // (arrival that opened it, pack)
    for (int64_t first = 0; first < args_.num_kept;) {
      const int64_t end = first + std::min(args_.window, args_.num_kept - first);
      by_size.clear();
      opened.clear();
      for (; first < end; ++first) by_size.emplace_back(-load_of(first).tokens, first);
      std::sort(by_size.begin(), by_size.end());
      std::set<std::pair<int64_t, int64_t>> room;  // (tokens left, pack)
      for (const auto& [negative_tokens, arrival] : by_size) {
        const Load sample = load_of(arrival);
        auto best = room.lower_bound({sample.tokens, 0});
        while (best != room.end() && !fits(packs_[best->second], sample)) ++best;
        int64_t pack;
        if (best == room.end()) {
          pack = open();
          opened.emplace_back(arrival, pack);
        } else {
          pack = best->second;
          room.erase(best);
        }
        const Load& load = place(arrival, sample, pack);
        // What is left of the window is no larger than this sample, but may be as small as one token.
        if (load.tokens < args_.max_tokens) room.emplace(args_.max_tokens - load.tokens, pack);
      }
      std::sort(opened.begin(), opened.end());
      for (const auto& [arrival, pack] : opened) emit(pack);
    }
  }

  // Packs in the order in which they were emitted, their samples in the order of arrival.
  int64_t write() const {
    std::vector<int64_t> next(packs_.size());
    args_.pack_ptr[0] = 0;
    for (int64_t i = 0; i < num_emitted(); ++i) {
      const int64_t pack = emitted_[i];
      next[pack] = args_.pack_ptr[i];
      args_.pack_ptr[i + 1] = args_.pack_ptr[i] + counts_[pack];
      args_.pack_tokens[i] = packs_[pack].tokens;
      args_.pack_frames[i] = packs_[pack].frames;
      args_.pack_cost[i] = packs_[pack].cost;
    }
    for (int64_t arrival = 0; arrival < args_.num_kept; ++arrival) {
      args_.sample_index[next[pack_of_[arrival]]++] = order_[arrival];
    }
    return num_emitted();
  }

 private:
  int64_t num_packs() const { return static_cast<int64_t>(packs_.size()); }
  int64_t num_emitted() const { return static_cast<int64_t>(emitted_.size()); }

  // The columns are read in a random order: what will be needed soon is fetched now.
  Load load_of(int64_t arrival) const {
    constexpr int64_t kAhead = 16;
    if (arrival + kAhead < args_.num_kept) {
      const int64_t soon = order_[arrival + kAhead];
      __builtin_prefetch(args_.num_tokens + soon);
      __builtin_prefetch(args_.num_frames + soon);
      __builtin_prefetch(args_.cost + soon);
    }
    const int64_t sample = order_[arrival];
    return {args_.num_tokens[sample], args_.num_frames[sample], args_.cost[sample]};
  }

  bool fits(const Load& load, const Load& sample) const {
    return sample.tokens <= args_.max_tokens - load.tokens && sample.frames <= args_.max_frames - load.frames &&
           load.cost + sample.cost <= args_.max_cost;
  }

  double fullness(const Load& load) const {
    const double tokens = static_cast<double>(load.tokens) / static_cast<double>(args_.max_tokens);
    const double frames = static_cast<double>(load.frames) / static_cast<double>(args_.max_frames);
    return std::max({tokens, frames, load.cost / args_.max_cost});
  }

  int64_t open() {
    packs_.emplace_back();
    counts_.push_back(0);
    return num_packs() - 1;
  }

  void emit(int64_t pack) { emitted_.push_back(pack); }

  const Load& place(int64_t arrival, const Load& sample, int64_t pack) {
    Load& load = packs_[pack];
    load.tokens += sample.tokens;
    load.frames += sample.frames;
    load.cost += sample.cost;
    ++counts_[pack];
    pack_of_[arrival] = pack;
    return load;
  }

  const PackArgs& args_;
  std::unique_ptr<int64_t[]> order_, pack_of_;  // by arrival: sample, pack
  std::vector<Load> packs_;                     // by the order of opening, as counts_
  std::vector<int64_t> counts_, emitted_;
};

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

int64_t pack_samples(const PackArgs& args) {
  require(args.num_kept >= 0 && args.num_kept <= args.num_samples, "num_kept must lie in [0, num_samples]");
  require(args.max_tokens >= 1 && args.max_frames >= 1 && args.max_cost > 0, "max_* must be above 0");
  require(args.open_packs >= 1 && args.window >= 1, "open_packs and window must be >= 1");
  require(args.keep != nullptr || args.num_kept == args.num_samples, "num_kept must be num_samples without keep");
  Planner planner(args);
  planner.check_samples();
  switch (args.strategy) {
    case PackStrategy::kInOrder:
      planner.in_order();
      break;
    case PackStrategy::kOpenBestFit:
      planner.open_best_fit();
      break;
    case PackStrategy::kFirstFit:
      planner.first_fit();
      break;
    case PackStrategy::kBestFit:
      planner.best_fit();
      break;
    case PackStrategy::kBestFitDecreasing:
      planner.best_fit_decreasing();
      break;
    default:
      throw std::invalid_argument("strategy must be 0 to 4, got " + std::to_string(static_cast<int>(args.strategy)));
  }
  return planner.write();
}

void pack_permutation(int64_t n, uint64_t seed, uint64_t epoch, uint64_t stream, int64_t* permutation) {
  require(n >= 0, "n must be >= 0");
  Permutation(static_cast<uint64_t>(n), seed, epoch, stream).write(0, n, permutation);
}

}  // namespace lrc::cpu
