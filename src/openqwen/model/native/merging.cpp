// The Online Merging Optimizer's step on one parameter (train/merging/).
//
// Every operation is a single float operation in the order of train/merging/plain.py, so both give
// the same bits. AdamW's step waits for memory, so this one reads little more: moments, masks and
// merge are one pass, in which a weight that nothing changes is not touched. OnTIES needs a second
// pass, over the weights alone: `collect` writes down the steps that may be large enough.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "masks.h"
#include "pool.h"

namespace openqwen {

enum MergingForm { kDare = 0, kTiesWeighted = 1, kTiesUnweighted = 2 };
enum MergingTask { kNoTask = 0, kFloat32 = 1, kBFloat16 = 2 };
enum MergingArray { kWeights, kMean, kSquare, kLost, kCached, kGradient, kDense, kArrays };

// Fields are described in train/merging/kernels.py, which fills them.
struct MergingCall {
  float* arrays[kDense];
  int64_t count, first, run, stride;
  const int32_t* task_index;
  const void* task;
  int64_t task_count;
  uint64_t step_key, task_key, limit;
  int64_t form, task_type, fresh, merges;
  int64_t low, high, listed;
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

constexpr int64_t kBlock = 4096;
constexpr int64_t kGroups = kBlock / kLanes;
constexpr int kCoarse = 15;  // bits of a magnitude below the 16 of the first histogram

// Arrays of a block, from its first element on; null where the step needs none.
struct Arrays {
  float* at[kArrays] = {};

  Arrays() = default;
  Arrays(const MergingCall& c, int64_t begin) {
    for (int k = 0; k < kDense; ++k) at[k] = c.arrays[k] ? c.arrays[k] + begin : nullptr;
  }
  float* operator[](int k) const { return at[k]; }
};

// Calls body(arrays, i, place): the sixteen elements from `place` of the block on are at arrays[…]
// + i. Where a tensor ends with fewer, these are a copy behind which zeros stand.
template <class Body>
inline void each_group(const Arrays& arrays, int64_t length, const Body& body) {
  int64_t place = 0;
  for (; place + kLanes <= length; place += kLanes) body(arrays, place, place);
  if (place == length) return;
  float copies[kArrays][kLanes] = {};
  Arrays padded;
  const size_t bytes = 4 * size_t(length - place);
  for (int k = 0; k < kArrays; ++k) {
    if (!arrays[k]) continue;
    padded.at[k] = copies[k];
    std::memcpy(copies[k], arrays[k] + place, bytes);
  }
  body(padded, 0, place);
  for (int k = 0; k <= kCached; ++k) {
    if (arrays[k]) std::memcpy(arrays[k] + place, copies[k], bytes);
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

// The moments, updated where there is a gradient.
inline Moments moments(const Numbers& n, const Arrays& a, int64_t i) {
  Lanes mean = load(a[kMean] + i), square = load(a[kSquare] + i);
  if (a[kGradient]) {
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

// (1 − α) F(d) ⊕ α F(τ) of kept entries; of floats or of lanes.
template <int kForm, class X>
inline X merged(X factor, X alpha, X zero, X step, X task) {
  const X a = step * factor, b = task * alpha;
  if (kForm == kDare) return a + b;
  if (kForm == kTiesWeighted) {
    const auto opposite = (above(zero, a) & above(b, zero)) | (above(a, zero) & above(zero, b));
    const X left = magnitude(a), right = magnitude(b);
    const X larger = choose(above(left, right), a, choose(above(right, left), b, zero));
    return choose(opposite, larger, a + b);
  }
  const auto positive = reaches(step + task, zero);
  const X up = choose(above(a, zero), a, zero), down = choose(above(zero, a), a, zero);
  const X task_up = choose(above(b, zero), b, zero), task_down = choose(above(zero, b), b, zero);
  return choose(positive, up, down) + choose(positive, task_up, task_down);
}

// weight + lost, to which `change` is added: a sum and what rounding lost of it (Knuth's TwoSum).
template <class X>
inline void add(X& weight, X& lost, X change) {
  const X w = weight, y = change + lost, sum = w + y, part = sum - w;
  lost = (w - (sum - part)) + (y - part);
  weight = sum;
}

int64_t global_index(const MergingCall& c, int64_t place) {
  return c.first + place / c.run * c.stride + place % c.run;
}

// Set the bits of a block's elements that are kept by the random numbers of a key: the lower half
// of a word of SplitMix64 for an even global index, the upper one for the odd index behind it.
void random_bits(const MergingCall& c, uint64_t key, int64_t begin, int64_t length, Mask* bits) {
  const uint32_t last = uint32_t(c.limit - 1);  // the limit is from 1 to 2³²
  std::fill_n(bits, kGroups, 0);
  for (int64_t at = 0; at < length;) {
    const uint64_t global = uint64_t(global_index(c, begin + at));
    const uint64_t start = key + ((global >> 1) + 1) * kGamma;
    const int64_t left = std::min(length - at, c.run - (begin + at) % c.run) / kLanes;
    if (at % kLanes == 0 && global % 2 == 0 && left) {
      for (int64_t g = 0; g < left; ++g) {
        bits[at / kLanes + g] = random_lanes(start + uint64_t(g * kLanes / 2) * kGamma, last);
      }
      at += left * kLanes;
    } else {
      const bool kept = uint32_t(mix(start) >> (global % 2 * 32)) <= last;
      bits[at / kLanes] |= Mask(kept << at % kLanes);
      ++at;
    }
  }
}

float task_value(const MergingCall& c, int64_t i) {
  if (c.task_type == kFloat32) return static_cast<const float*>(c.task)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(c.task)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A block's entries of the task vector, where it does not have all.
struct Entries {
  Mask bits[kGroups] = {};
  int32_t place[kBlock];
  float value[kBlock];
  int64_t count = 0;

  Entries(const MergingCall& c, int64_t begin, int64_t length) {
    if (c.task_type == kNoTask) return;
    if (c.task_index) {
      const int32_t* stop = c.task_index + c.task_count;
      const int32_t* at = std::lower_bound(c.task_index, stop, int32_t(begin));
      for (; at < stop && *at < begin + length; ++at) {
        place[count] = int32_t(*at - begin);
        bits[place[count] / kLanes] |= Mask(1u << place[count] % kLanes);
        value[count++] = task_value(c, at - c.task_index);
      }
    } else {  // fresh masks: the task vector is read only where it is kept
      random_bits(c, c.task_key, begin, length, bits);
      for (int64_t g = 0; g < kGroups; ++g) {
        for (uint32_t left = bits[g]; left; left &= left - 1) {
          place[count++] = int32_t(g * kLanes + __builtin_ctz(left));
        }
      }
      for (int64_t n = 0; n < count; ++n) value[n] = task_value(c, begin + place[n]);
    }
  }
};

// The steps of a block that `collect` has written down, in their order.
struct Listed {
  const MergingCall& c;
  int64_t begin;
  const float* next;

  Listed(const MergingCall& call, int64_t begin)
      : c(call), begin(begin), next(call.listed ? call.steps + call.starts[begin / kBlock] : nullptr) {}

  // The next sixteen, and which of them are kept.
  Lanes take(int64_t place, Mask* kept) {
    const Mask lanes = c.lanes[(begin + place) / kLanes];
    *kept = 0;
    if (!lanes) return all(0.0f);
    const Lanes step = expand(next, lanes);
    next += __builtin_popcount(lanes);
    *kept = lanes & bits_above(step, int32_t(c.threshold - 1));
    uint32_t equal = *kept & ~bits_above(step, int32_t(c.threshold));
    for (; equal && c.last >= 0; equal &= equal - 1) {
      const int lane = __builtin_ctz(equal);
      if (global_index(c, begin + place + lane) > c.last) *kept &= Mask(~(1u << lane));
    }
    return step;
  }
};

// Change all weights of a block, with compensation.
template <int kForm>
void apply_dense(const MergingCall& c, const Arrays& arrays, int64_t begin, int64_t length,
                 Mask* kept) {
  const Numbers n(c);
  const Lanes zero = all(0.0f);
  const bool merges = c.merges;
  Listed listed(c, begin);
  each_group(arrays, length, [&](const Arrays& a, int64_t i, int64_t place) {
    Mask lanes = kept[place / kLanes];
    const Lanes step = c.listed ? listed.take(place, &lanes)
                                : step_of(n, moments(n, a, i), a, i, merges);
    Lanes weights = load(a[kWeights] + i) * n.decay, lost = load(a[kLost] + i), change = step;
    if (merges) {
      const Lanes task = a[kDense] ? load(a[kDense] + i) : zero;
      change = merged<kForm>(n.factor, n.alpha, zero, keep(lanes, step), task);
      if (a[kCached]) change = change - load(a[kCached] + i);
    }
    if (a[kCached]) store(a[kCached] + i, merges ? zero : load(a[kCached] + i) + step);
    add(weights, lost, change);
    store(a[kWeights] + i, weights);
    store(a[kLost] + i, lost);
  });
}

// Change weights by the kept entries of the step, those with an entry of the task vector with
// compensation.
template <int kForm>
void apply_sparse(const MergingCall& c, const Arrays& arrays, int64_t begin, int64_t length,
                  Mask* kept, const Entries& entries) {
  const Numbers n(c);
  const bool decays = c.decay != 1.0f;
  float steps[kBlock];
  for (int64_t e = 0; e < entries.count; ++e) __builtin_prefetch(arrays[kLost] + entries.place[e]);
  Listed listed(c, begin);
  each_group(arrays, length, [&](const Arrays& a, int64_t i, int64_t place) {
    const int64_t g = place / kLanes;
    Lanes step;
    if (c.listed) {
      step = listed.take(place, &kept[g]);
    } else {
      const Moments m = moments(n, a, i);
      if (kept[g]) step = step_of(n, m, a, i, true);
    }
    if (kept[g] & entries.bits[g]) store(steps + place, step);
    const Mask alone = kept[g] & Mask(~entries.bits[g]);
    if (!alone && !decays) return;
    Lanes weights = load(a[kWeights] + i) * n.decay;
    if (alone) weights = weights + keep(alone, step * n.factor);
    store(a[kWeights] + i, weights);
  });
  for (int64_t e = 0; e < entries.count; ++e) {
    const int32_t j = entries.place[e];
    const float step = kept[j / kLanes] >> j % kLanes & 1 ? steps[j] : 0.0f;
    const float change = merged<kForm>(c.factor, c.alpha, 0.0f, step, entries.value[e]);
    add(arrays[kWeights][j], arrays[kLost][j], change);
  }
}

template <int kForm>
void apply_block(const MergingCall& c, int64_t begin, int64_t length) {
  Arrays arrays(c, begin);
  Mask kept[kGroups];
  if (c.merges && !(c.limit >> 32)) {
    random_bits(c, c.step_key, begin, length, kept);
  } else {
    std::fill_n(kept, kGroups, kAllLanes);
  }
  float task[kBlock];
  if (!c.merges) return apply_dense<kForm>(c, arrays, begin, length, kept);
  if (c.task_type != kNoTask && !c.task_index && !c.fresh) {
    arrays.at[kDense] = task;
    if (c.task_type == kFloat32) {
      arrays.at[kDense] = static_cast<float*>(const_cast<void*>(c.task)) + begin;
    } else {
      for (int64_t j = 0; j < length; ++j) task[j] = task_value(c, begin + j);
    }
    return apply_dense<kForm>(c, arrays, begin, length, kept);
  }
  const Entries entries(c, begin, length);
  if (!arrays[kCached]) return apply_sparse<kForm>(c, arrays, begin, length, kept, entries);
  std::fill_n(task, kBlock, 0.0f);
  for (int64_t e = 0; e < entries.count; ++e) task[entries.place[e]] = entries.value[e];
  arrays.at[kDense] = task;
  apply_dense<kForm>(c, arrays, begin, length, kept);
}

// Write down a block's steps with magnitudes from `low` on; those up to `high` with their places.
struct Collector {
  MergingCall& c;
  std::atomic<int64_t> steps_count{0}, near_count{0}, above{0};

  void block(int64_t begin, int64_t length) {
    const Numbers n(c);
    float steps[kBlock + kLanes];
    int64_t places[kBlock];
    int32_t bits[kBlock];
    int64_t count = 0, near = 0;
    const int32_t low = int32_t(c.low), high = int32_t(c.high);
    const bool merges = c.merges;
    each_group(Arrays(c, begin), length, [&](const Arrays& a, int64_t i, int64_t place) {
      const Lanes step = step_of(n, moments(n, a, i), a, i, merges);
      Mask lanes = bits_above(step, low - 1);
      if (length - place < kLanes) lanes &= Mask((1u << (length - place)) - 1);
      c.lanes[(begin + place) / kLanes] = lanes;
      if (!lanes) return;
      compress(steps + count, lanes, step);
      for (uint32_t left = lanes & ~bits_above(step, high); left; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        places[near] = begin + place + lane;
        const int before = __builtin_popcount(lanes & ((1u << lane) - 1));
        bits[near++] = magnitude_bits(steps[count + before]);
      }
      count += __builtin_popcount(lanes);
    });
    const int64_t start = c.starts[begin / kBlock] = steps_count.fetch_add(count);
    if (start + count <= c.steps_room) std::memcpy(c.steps + start, steps, 4 * size_t(count));
    above.fetch_add(count - near);
    const int64_t at = near ? near_count.fetch_add(near) : 0;
    if (near && at + near <= c.near_room) {
      std::memcpy(c.near_places + at, places, 8 * size_t(near));
      std::memcpy(c.near_bits + at, bits, 4 * size_t(near));
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

}  // namespace
}  // namespace openqwen

// Merge the step with the task vector, after the moments' update where there is a gradient.
extern "C" void openqwen_merging_apply(const openqwen::MergingCall* call) {
  using namespace openqwen;
  parallel_for(call->count, kBlock, [&](int64_t begin, int64_t end) {
    if (call->form == kDare) return apply_block<kDare>(*call, begin, end - begin);
    if (call->form == kTiesWeighted) return apply_block<kTiesWeighted>(*call, begin, end - begin);
    apply_block<kTiesUnweighted>(*call, begin, end - begin);
  });
}

// Update the moments where there is a gradient, and write down the large steps.
extern "C" void openqwen_merging_collect(openqwen::MergingCall* call) {
  using namespace openqwen;
  Collector collector{*call};
  parallel_for(call->count, kBlock,
               [&](int64_t begin, int64_t end) { collector.block(begin, end - begin); });
  call->steps_count = collector.steps_count;
  call->near_count = collector.near_count;
  call->above = collector.above;
}

// Update the moments where there is a gradient, and count the magnitudes of the step: by their
// upper 16 bits with bucket < 0, else by their lower 15 bits within that bucket.
extern "C" void openqwen_merging_count(const openqwen::MergingCall* call, int64_t bucket,
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
