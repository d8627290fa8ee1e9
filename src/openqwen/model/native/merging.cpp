// The Online Merging Optimizer's step on one parameter (train/merging/).
//
// Every operation is a single float operation in the order of train/merging/plain.py, so both give
// the same bits. AdamW's step waits for memory, and so does this one: moments, masks and merge are
// one pass. Nearly all is computed for all sixteen elements of a group, since branches that depend
// on masks cost more than arithmetic. OnTIES needs a second pass, over the weights alone: `collect`
// writes down the steps that may be large enough.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "places.h"
#include "pool.h"

namespace openqwen {

enum MergingForm { kDare = 0, kTiesWeighted = 1, kTiesUnweighted = 2 };
enum MergingTask { kNoTask = 0, kFloat32 = 1, kBFloat16 = 2 };
enum MergingKept { kAll, kDrawn, kListed };  // steps: all, by random numbers, those of the list
enum MergingArray { kWeights, kMean, kSquare, kLost, kCached, kGradient, kArrays };

// Fields are described in train/merging/kernels.py, which fills them.
struct MergingCall {
  float* arrays[kArrays];
  int64_t count, first, run, stride;
  const void* task;
  const Mask* task_lanes;
  const int64_t* task_starts;
  uint64_t step_key, task_key, limit;
  int64_t form, task_type, fresh, merges;
  int64_t low, high, listed, keep;
  Mask* lanes;
  int64_t* starts;
  float* steps;
  int64_t steps_room, steps_count;
  int64_t* near_places;
  int32_t* near_bits;
  int64_t near_room, near_count, above;
  int64_t threshold, last;
  float scale, keep1, new1, keep2, new2, rate, root, eps, decay, factor, alpha;
};

namespace {

constexpr int64_t kAhead = 8, kFar = 64;  // groups between the request for memory and its use
constexpr int64_t kBuckets = 4096;  // of magnitudes near the last one that is kept
constexpr int kCoarse = 15;  // bits of a magnitude below the 16 of the first histogram

// Arrays of a block, from its first element on; null where the step needs none.
struct Arrays {
  float* at[kArrays] = {};

  Arrays() = default;
  Arrays(const MergingCall& c, int64_t begin) {
    for (int k = 0; k < kArrays; ++k) at[k] = c.arrays[k] ? c.arrays[k] + begin : nullptr;
  }
  float* operator[](int k) const { return at[k]; }
};

// Calls body(arrays, i, place): the sixteen elements from `place` of the block on are at arrays[…]
// + i. Where a tensor ends with fewer, these are a copy behind which zeros stand.
template <class Body>
inline void each_group(const Arrays& arrays, int64_t length, const Body& body) {
  const int64_t whole = length / kLanes * kLanes;
  const size_t rest = 4 * size_t(length - whole);
  float copies[kArrays][kLanes] = {};
  Arrays here = arrays;
  // Two rounds of one loop: a body with two callers would not be inlined, at twice the time.
  for (const bool ends : {false, true}) {
    for (int k = 0; ends && k < kArrays; ++k) {
      if (!arrays[k]) continue;
      here.at[k] = copies[k];
      std::memcpy(copies[k], arrays[k] + whole, rest);
    }
    const int64_t first = ends ? whole : 0, count = ends ? length - whole : whole;
    for (int64_t i = 0; i < count; i += kLanes) body(here, i, first + i);
  }
  for (int k = 0; k <= kCached; ++k) {
    if (arrays[k]) std::memcpy(arrays[k] + whole, copies[k], rest);
  }
}

// The call's numbers in all lanes.
struct Numbers {
  Lanes scale, keep1, new1, keep2, new2, rate, root, eps, decay, factor, alpha;

  explicit Numbers(const MergingCall& c)
      : scale(all(c.scale)), keep1(all(c.keep1)), new1(all(c.new1)), keep2(all(c.keep2)),
        new2(all(c.new2)), rate(all(c.rate)), root(all(c.root)), eps(all(c.eps)),
        decay(all(c.decay)), factor(all(c.factor)), alpha(all(c.alpha)) {}
};

struct Moments {
  Lanes mean, square;
};

// Ask for memory that is used some groups later.
inline void ask(const float* from) {
  __builtin_prefetch(from + kAhead * kLanes, 1);
}

// The moments, updated where there is a gradient.
inline Moments moments(const Numbers& n, const Arrays& a, int64_t i) {
  for (int k : {kMean, kSquare}) ask(a[k] + i);
  Lanes mean = load(a[kMean] + i), square = load(a[kSquare] + i);
  if (a[kGradient]) {
    ask(a[kGradient] + i);
    const Lanes g = load(a[kGradient] + i) * n.scale;
    mean = mean * n.keep1 + g * n.new1;
    square = square * n.keep2 + g * g * n.new2;
    store(a[kMean] + i, mean);
    store(a[kSquare] + i, square);
  }
  return {mean, square};
}

// AdamW's step, with what is cached where it merges.
inline Lanes step_of(const Numbers& n, const Moments& m, const Arrays& a, int64_t i, bool merges) {
  const Lanes step = m.mean * n.rate / (root(m.square) * n.root + n.eps);
  return a[kCached] && merges ? step + load(a[kCached] + i) : step;
}

// (1 − α) F(d) ⊕ α F(τ) of kept entries. Always inlined: without AVX-512 a call passes Lanes
// through memory, and the whole loop takes more than twice the time.
template <int kForm>
[[gnu::always_inline]] inline Lanes merged(const Numbers& n, Lanes step, Lanes task) {
  const Lanes a = step * n.factor, b = task * n.alpha, zero = all(0.0f);
  if (kForm == kDare) return a + b;
  if (kForm == kTiesWeighted) {
    const Mask opposite = (above(zero, a) & above(b, zero)) | (above(a, zero) & above(zero, b));
    const Lanes left = magnitude(a), right = magnitude(b);
    const Lanes larger = choose(above(left, right), a, keep(above(right, left), b));
    return choose(opposite, larger, a + b);
  }
  const Mask positive = reaches(step + task, zero), negative = Mask(~positive);
  return keep((positive & above(a, zero)) | (negative & above(zero, a)), a) +
         keep((positive & above(b, zero)) | (negative & above(zero, b)), b);
}

// weights + lost, to which `change` is added: a sum and what rounding lost of it (Knuth's TwoSum).
inline void add(Lanes& weights, Lanes& lost, Lanes change) {
  const Lanes w = weights, y = change + lost, sum = w + y, part = sum - w;
  lost = (w - (sum - part)) + (y - part);
  weights = sum;
}

int64_t global_index(const MergingCall& c, int64_t place) {
  return c.first + place / c.run * c.stride + place % c.run;
}

// Which of a block's elements the random numbers of a key keep: the lower half of a word of
// SplitMix64 for an even global index, the upper one for the odd index behind it.
class Draw {
 public:
  Draw(const MergingCall& c, uint64_t key, int64_t begin, int64_t length, bool used)
      : last_(uint32_t(c.limit - 1)) {  // the limit is from 1 to 2³²
    const uint64_t global = uint64_t(global_index(c, begin));
    start_ = key + ((global >> 1) + 1) * kGamma;
    direct_ = !used || (global % 2 == 0 && c.run - begin % c.run >= length);
    for (int64_t j = 0; !direct_ && j < length; ++j) {  // rows of a part of a tensor end here
      const uint64_t index = uint64_t(global_index(c, begin + j));
      const uint64_t word = mix(key + ((index >> 1) + 1) * kGamma) >> (index % 2 * 32);
      bits_[j / kLanes] |= Mask((uint32_t(word) <= last_) << j % kLanes);
    }
  }

  Mask at(int64_t place) const {
    return direct_ ? random_lanes(start_ + uint64_t(place / 2) * kGamma, last_)
                   : bits_[place / kLanes];
  }

 private:
  uint64_t start_;
  uint32_t last_;
  bool direct_;
  Mask bits_[kGroups] = {};
};

// Which of sixteen listed steps OnTIES keeps.
[[gnu::always_inline]] inline Mask largest(const MergingCall& c, Mask listed, Lanes step,
                                           int64_t place) {
  Mask kept = listed & bits_above(step, int32_t(c.threshold - 1));
  if (c.last < 0) return kept;
  for (uint32_t equal = kept & ~bits_above(step, int32_t(c.threshold)); equal; equal &= equal - 1) {
    const int lane = __builtin_ctz(equal);
    if (global_index(c, place + lane) > c.last) kept &= Mask(~(1u << lane));
  }
  return kept;
}

// Change a block's weights. Task: the type of the task vector's values.
template <int kForm, int kKept, class Task>
void apply_block(const MergingCall& c, int64_t begin, int64_t length) {
  const Numbers n(c);
  const bool merges = c.merges, whole = c.arrays[kCached];
  const bool has_task = merges && c.task_type != kNoTask, fresh = has_task && c.fresh;
  const Draw draw(c, c.step_key, begin, length, kKept == kDrawn);
  const Draw task_draw(c, c.task_key, begin, length, fresh);
  Packed<float> steps(kKept == kListed ? c.lanes : nullptr, c.starts, c.steps, begin);
  Packed<Task> packed(has_task ? c.task_lanes : nullptr, c.task_starts, c.task, begin);
  const Task* dense = static_cast<const Task*>(c.task) + (has_task && !packed.lanes ? begin : 0);
  const int64_t last = (length - 1) / kLanes;
  each_group(Arrays(c, begin), length, [&](const Arrays& a, int64_t i, int64_t place) {
    const int64_t g = place / kLanes;
    // Elements with an entry of the task vector, which are changed with compensation.
    const Mask entries = packed.lanes ? packed.lanes[g]
                         : fresh      ? task_draw.at(place)
                                      : Mask(has_task ? kAllLanes : 0);
    ask(a[kWeights] + i);
    if (entries && !packed.lanes) ask(a[kLost] + i);
    if (packed.lanes) {  // far between, so each one takes longer; without a branch
      const int64_t far = std::min(g + kFar, last) - g;
      __builtin_prefetch((packed.lanes[g + far] ? a[kLost] + far * kLanes : a[kWeights]) + i, 1);
    }
    Lanes step, weights = load(a[kWeights] + i) * n.decay;
    if (kKept == kListed) {
      const Mask listed = steps.lanes[g];
      if (!listed && !entries && !whole) return store(a[kWeights] + i, weights);
      step = steps.take(listed);
      step = keep(largest(c, listed, step, begin + place), step);
    } else {
      step = step_of(n, moments(n, a, i), a, i, merges);
      if (kKept == kDrawn) step = keep(draw.at(place), step);
    }
    const Lanes plain = weights + step * n.factor;
    if (!entries && !whole) return store(a[kWeights] + i, plain);
    Lanes task = all(0.0f), lost = load(a[kLost] + i), change = step, rest = lost;
    if (packed.lanes) {
      task = packed.take(entries);
    } else if (entries) {
      task = keep(entries, up_to(dense + place, length - place));
    }
    if (merges) change = merged<kForm>(n, step, task);
    if (whole) {
      const Lanes cached = load(a[kCached] + i);
      if (merges) change = change - cached;
      store(a[kCached] + i, merges ? all(0.0f) : cached + step);
    }
    add(weights, rest, change);
    const Mask exact = whole ? kAllLanes : entries;
    store(a[kWeights] + i, choose(exact, weights, plain));
    store(a[kLost] + i, choose(exact, rest, lost));
  });
}

template <int kForm, class Task>
void apply_kept(const MergingCall& c, int64_t begin, int64_t length) {
  if (c.listed) {
    apply_block<kForm, kListed, Task>(c, begin, length);
  } else if (c.merges && !(c.limit >> 32)) {
    apply_block<kForm, kDrawn, Task>(c, begin, length);
  } else {
    apply_block<kForm, kAll, Task>(c, begin, length);
  }
}

// Which steps can have a magnitude from `low` on, told from the moments without root and division:
//
//     |mean| · rate / (√square · root + eps) ≥ low
//         only if   mean² · (rate / (low · root))² ≥ square
//
// A margin covers rounding, and a mean whose square a float cannot hold is too small as long as eps
// is not. Where that does not hold `all_may` is set.
struct Bound {
  Lanes factor, least = all(1e-36f), margin = all(0.9999f);
  bool all_may;

  explicit Bound(const MergingCall& c) {
    float low;
    const int32_t bits = int32_t(c.low);
    std::memcpy(&low, &bits, 4);
    const double rate = std::fabs(double(c.rate)), share = rate / (double(low) * double(c.root));
    const bool fits = share > 1e-8 && share < 1e8 && double(low) * double(c.eps) > 1e-17 * rate;
    all_may = c.arrays[kCached] || !fits;
    factor = all(all_may ? 1.0f : float(share * share));
  }
  bool operator()(const Moments& m) const {
    const Lanes squared = m.mean * m.mean;
    const Mask small = above(m.square * margin, squared * factor) | above(least, squared);
    return all_may || small != kAllLanes;  // NaN is not small
  }
};

// Write down a block's steps with magnitudes from `low` on; those up to `high` with their places.
struct Collector {
  MergingCall& c;
  std::atomic<int64_t> steps_count{0}, near_count{0}, above{0};

  void block(int64_t begin, int64_t length) {
    const Numbers n(c);
    const Bound may(c);
    float steps[kBlock + kLanes], near_steps[kBlock + kLanes];
    int32_t places[kBlock + kLanes];
    int64_t count = 0, near = 0;
    const int32_t low = int32_t(c.low), high = int32_t(c.high);
    const bool merges = c.merges;
    each_group(Arrays(c, begin), length, [&](const Arrays& a, int64_t i, int64_t place) {
      const Moments m = moments(n, a, i);
      Mask& lanes = c.lanes[(begin + place) / kLanes];
      lanes = 0;
      if (!may(m)) return;
      const Lanes step = step_of(n, m, a, i, merges);
      Mask large = bits_above(step, low - 1);
      if (length - place < kLanes) large &= Mask((1u << (length - place)) - 1);
      if (!large) return;
      lanes = large;
      compress(steps + count, large, step);
      count += __builtin_popcount(large);
      const Mask within = large & Mask(~bits_above(step, high));
      if (!within) return;
      compress(near_steps + near, within, magnitude(step));
      compress_places(places + near, within, int32_t(place));
      near += __builtin_popcount(within);
    });
    const int64_t start = c.starts[begin / kBlock] = steps_count.fetch_add(count);
    if (start + count <= c.steps_room) std::memcpy(c.steps + start, steps, 4 * size_t(count));
    above.fetch_add(count - near);
    const int64_t at = near ? near_count.fetch_add(near) : 0;
    if (near && at + near <= c.near_room) {
      for (int64_t k = 0; k < near; ++k) c.near_places[at + k] = begin + places[k];
      std::memcpy(c.near_bits + at, near_steps, 4 * size_t(near));
    }
  }
};

// Add the magnitudes of a range to a histogram. `slot` gives a magnitude's place, or a negative
// number. Each of a few long pieces has its own counts.
template <class Slot>
void histogram(const MergingCall& c, int64_t* counts, int64_t slots, const Slot& slot) {
  const int64_t pieces = std::min<int64_t>(WorkerPool::shared().threads(), (c.count >> 16) + 1);
  const int64_t grain = ((c.count + pieces - 1) / pieces + kBlock - 1) / kBlock * kBlock;
  std::vector<std::vector<uint32_t>> parts(pieces);
  parallel_for(c.count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    const Numbers n(c);
    std::vector<uint32_t>& part = parts[begin / grain];
    part.resize(slots);
    each_group(Arrays(c, begin), end - begin, [&](const Arrays& a, int64_t i, int64_t place) {
      float step[kLanes];
      store(step, step_of(n, moments(n, a, i), a, i, c.merges));
      for (int64_t j = 0; j < std::min<int64_t>(kLanes, end - begin - place); ++j) {
        const int64_t where = slot(uint32_t(magnitude_bits(step[j])));
        if (where >= 0) ++part[where];
      }
    });
  });
  for (const std::vector<uint32_t>& part : parts) {
    for (size_t n = 0; n < part.size(); ++n) counts[n] += part[n];
  }
}

void apply(const MergingCall& c) {
  const bool narrow = c.task_type == kBFloat16;
  const auto block = c.form == kDare           ? narrow ? apply_kept<kDare, uint16_t>
                                                        : apply_kept<kDare, float>
                     : c.form == kTiesWeighted ? narrow ? apply_kept<kTiesWeighted, uint16_t>
                                                        : apply_kept<kTiesWeighted, float>
                     : narrow                  ? apply_kept<kTiesUnweighted, uint16_t>
                                               : apply_kept<kTiesUnweighted, float>;
  parallel_for(c.count, kBlock,
               [&](int64_t begin, int64_t end) { block(c, begin, end - begin); });
}

void collect(MergingCall& c) {
  Collector collector{c};
  parallel_for(c.count, kBlock,
               [&](int64_t begin, int64_t end) { collector.block(begin, end - begin); });
  c.steps_count = collector.steps_count;
  c.near_count = collector.near_count;
  c.above = collector.above;
  c.arrays[kGradient] = nullptr;  // the moments are updated
}

// Find the magnitude of the `keep`-th largest step among those that `collect` wrote down: whether
// it is within the bounds. See `_collected` in train/merging/largest.py, which does so over ranks.
bool choose_last(MergingCall& c) {
  int64_t left = c.keep - c.above;
  const int64_t near = c.near_count;
  if (c.steps_count > c.steps_room || near > c.near_room || left < 0) return false;
  if (left > near && c.low > 1) return false;
  c.threshold = left ? c.low : c.high + 1;
  c.last = -1;
  if (left == 0 || left >= near) return true;
  // The bucket in which it is, then its elements in order: larger ones first, then smaller indices.
  int shift = 0;
  while ((c.high - c.low) >> shift >= kBuckets) ++shift;
  const auto bucket_of = [&](int64_t k) { return (c.near_bits[k] - c.low) >> shift; };
  int64_t counts[kBuckets] = {}, bucket = kBuckets;
  for (int64_t k = 0; k < near; ++k) ++counts[bucket_of(k)];
  while (left > 0) left -= counts[--bucket];
  left += counts[bucket];
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t k = 0; k < near; ++k) {
    if (bucket_of(k) != bucket) continue;
    found.push_back({-int64_t(c.near_bits[k]), global_index(c, c.near_places[k])});
  }
  std::nth_element(found.begin(), found.begin() + (left - 1), found.end());
  c.threshold = -found[left - 1].first;
  c.last = found[left - 1].second;
  return true;
}

}  // namespace
}  // namespace openqwen

// Do the steps of several parameters, one after the other. With `keep`, the largest steps are
// chosen first; where they are not found, the moments alone are updated and `listed` is 0.
extern "C" void openqwen_merging_steps(openqwen::MergingCall* calls, int64_t count) {
  using namespace openqwen;
  for (MergingCall* call = calls; call < calls + count; ++call) {
    if (call->keep) {
      collect(*call);
      call->listed = choose_last(*call);
    }
    if (!call->keep || call->listed) apply(*call);
  }
}

// Update the moments where there is a gradient, and write down the large steps.
extern "C" void openqwen_merging_collect(openqwen::MergingCall* call) { openqwen::collect(*call); }

// Update the moments where there is a gradient, and count the magnitudes of the step: by their
// upper 16 bits with bucket < 0, else by their lower 15 bits within that bucket.
extern "C" void openqwen_merging_count(openqwen::MergingCall* call, int64_t bucket,
                                       int64_t* counts) {
  using namespace openqwen;
  if (bucket < 0) {
    histogram(*call, counts, int64_t(1) << 16, [](uint32_t bits) { return bits >> kCoarse; });
  } else {
    const uint32_t upper = uint32_t(bucket);
    histogram(*call, counts, int64_t(1) << kCoarse, [=](uint32_t bits) {
      return bits >> kCoarse == upper ? int64_t(bits & ((1 << kCoarse) - 1)) : -1;
    });
  }
}
