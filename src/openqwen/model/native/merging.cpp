// The Online Merging Optimizer's step on one parameter (train/merging/).
//
// Every operation is a single float operation in the order of train/merging/plain.py, so both give
// the same bits. A parameter is worked through in blocks that stay in the first cache. A masked
// entry of the step costs no access to its weight, so a sparse step is about as fast as AdamW's.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"

namespace openqwen {

enum MergingForm { kDare = 0, kTiesWeighted = 1, kTiesUnweighted = 2 };
enum MergingTask { kNoTask = 0, kFloat32 = 1, kBFloat16 = 2 };

// Fields are described in train/merging/kernels.py, which fills them.
struct MergingCall {
  float *weights, *mean, *square, *lost, *cached;
  const float* gradient;
  int64_t count, first, run, stride;
  const int32_t* task_index;
  const void* task;
  int64_t task_count;
  uint64_t step_key, task_key, limit;
  int64_t* deferred;
  int64_t deferred_count;
  int64_t form, task_type, fresh, merges;
  int64_t low, high;
  float scale, keep1, new1, keep2, new2, rate, root, eps, decay, factor, alpha;
};

namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kGroup = 16;  // floats of a cache line
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;
constexpr int kCoarse = 15;  // bits of a magnitude below the 16 of the first histogram

inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

// out[j] = x[j] where the random bits of element begin + j keep it, else 0. A word of SplitMix64 at
// the global index's half has the bits of two elements.
void keep_random(const MergingCall& c, uint64_t key, int64_t begin, int64_t end,
                 const float* __restrict x, float* __restrict out) {
  uint64_t words[kBlock / 2 + 1];
  uint32_t bits[kBlock + 2];
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / c.run, column = at - row * c.run;
    const int64_t length = std::min(end - at, c.run - column);
    const uint64_t global = uint64_t(c.first + row * c.stride + column);
    const int64_t odd = global & 1, pairs = (length + odd + 1) / 2;
    const uint64_t start = key + ((global >> 1) + 1) * kGamma;
    for (int64_t i = 0; i < pairs; ++i) words[i] = mix(start + uint64_t(i) * kGamma);
    std::memcpy(bits, words, 8 * pairs);  // the lower half first, on every processor of today
    const uint32_t last = uint32_t(c.limit - 1);  // the limit is from 1 to 2³²
    const float* from = x + (at - begin);
    float* to = out + (at - begin);
    for (int64_t i = 0; i < length; ++i) to[i] = bits[i + odd] <= last ? from[i] : 0.0f;
    at += length;
  }
}

// AdamW's step, with what is cached where it merges. Where there is a gradient, the moments are
// updated before and the weights decayed, in the same loop: it waits for memory while it computes.
void steps(const MergingCall& c, int64_t begin, int64_t end, float* __restrict out) {
  float *__restrict mean = c.mean + begin, *__restrict square = c.square + begin;
  const int64_t length = end - begin;
  // Copies: a store into an array might change a field of `c`, which would keep the loops scalar.
  const float rate = c.rate, root = c.root, eps = c.eps;
  if (c.gradient) {
    float* __restrict weights = c.weights + begin;
    const float* __restrict gradient = c.gradient + begin;
    const float scale = c.scale, keep1 = c.keep1, new1 = c.new1, keep2 = c.keep2, new2 = c.new2;
    const float decay = c.decay;
    for (int64_t j = 0; j < length; ++j) {
      const float g = gradient[j] * scale;
      const float m = mean[j] * keep1 + g * new1, v = square[j] * keep2 + g * g * new2;
      mean[j] = m;
      square[j] = v;
      weights[j] *= decay;
      out[j] = m * rate / (std::sqrt(v) * root + eps);
    }
  } else {
    for (int64_t j = 0; j < length; ++j) {
      out[j] = mean[j] * rate / (std::sqrt(square[j]) * root + eps);
    }
  }
  if (c.cached && c.merges) {
    const float* __restrict cached = c.cached + begin;
    for (int64_t j = 0; j < length; ++j) out[j] += cached[j];
  }
}

template <int kForm>
inline float merged(float factor, float alpha, float step, float task) {
  const float a = step * factor, b = task * alpha;
  if (kForm == kDare) return a + b;
  if (kForm == kTiesWeighted) {
    const bool opposite = (a < 0 && b > 0) || (a > 0 && b < 0);
    const float left = std::fabs(a), right = std::fabs(b);
    const float larger = left > right ? a : right > left ? b : 0.0f;
    return opposite ? larger : a + b;
  }
  const bool positive = step + task >= 0.0f;
  const float x = (positive ? a > 0 : a < 0) ? a : 0.0f;
  const float y = (positive ? b > 0 : b < 0) ? b : 0.0f;
  return x + y;
}

// weight + lost, to which `change` is added: a sum and what rounding lost of it (Knuth's TwoSum).
inline void add(float& weight, float& lost, float change) {
  const float w = weight, y = change + lost, sum = w + y, part = sum - w;
  lost = (w - (sum - part)) + (y - part);
  weight = sum;
}

float task_value(const MergingCall& c, int64_t i) {
  if (c.task_type == kFloat32) return static_cast<const float*>(c.task)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(c.task)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The entries of the sparse task vector in a block.
struct Entries {
  int32_t place[kBlock];
  float value[kBlock];
  int64_t count = 0;
};

void find_entries(const MergingCall& c, int64_t begin, int64_t end, Entries& entries) {
  entries.count = 0;
  if (c.task_type == kNoTask) return;
  if (c.task_index) {
    const int32_t* stop = c.task_index + c.task_count;
    for (const int32_t* at = std::lower_bound(c.task_index, stop, int32_t(begin));
         at < stop && *at < end; ++at) {
      entries.place[entries.count] = int32_t(*at - begin);
      entries.value[entries.count++] = task_value(c, at - c.task_index);
    }
    return;
  }
  float ones[kBlock], kept[kBlock];  // fresh masks: the task vector is read only where it is kept
  for (float& one : ones) one = 1.0f;
  keep_random(c, c.task_key, begin, end, ones, kept);
  for (int64_t j = 0; j < end - begin; ++j) {
    entries.place[entries.count] = int32_t(j);
    entries.count += kept[j] != 0.0f;
  }
  for (int64_t n = 0; n < entries.count; ++n) {
    entries.value[n] = task_value(c, begin + entries.place[n]);
  }
}

// Change weights at the task vector's entries with compensation, the others by the step alone.
template <int kForm>
void apply_sparse(const MergingCall& c, int64_t begin, int64_t end, const float* kept,
                  const Entries& entries, const std::vector<int32_t>& deferred) {
  float* __restrict weights = c.weights + begin;
  const float factor = c.factor;
  float sums[kBlock];
  for (int64_t n = 0; n < entries.count; ++n) {
    const int32_t j = entries.place[n];
    sums[n] = weights[j];
    if (!deferred.empty() && std::binary_search(deferred.begin(), deferred.end(), j)) continue;
    const float change = merged<kForm>(c.factor, c.alpha, kept[j], entries.value[n]);
    add(sums[n], c.lost[begin + j], change);
  }
  for (int64_t from = 0; from < end - begin; from += kGroup) {
    const int64_t to = std::min(from + kGroup, end - begin);
    uint32_t any = 0;
    for (int64_t j = from; j < to; ++j) any |= magnitude(kept[j]);
    if (!any) continue;
    for (int64_t j = from; j < to; ++j) weights[j] += kept[j] * factor;
  }
  for (int64_t n = 0; n < entries.count; ++n) weights[entries.place[n]] = sums[n];
}

// Change all weights of a block with compensation; `kept` is a plain step where nothing merges.
template <int kForm>
void apply_dense(const MergingCall& c, int64_t begin, int64_t end, const float* kept,
                 const float* task, const std::vector<int32_t>& deferred) {
  float *__restrict weights = c.weights + begin, *__restrict lost = c.lost + begin;
  float* __restrict cached = c.cached ? c.cached + begin : nullptr;
  const int64_t length = end - begin;
  const float factor = c.factor, alpha = c.alpha;
  std::vector<float> before;
  for (const int32_t j : deferred) {
    before.insert(before.end(), {weights[j], lost[j], cached ? cached[j] : 0.0f});
  }
  if (!c.merges) {
    for (int64_t j = 0; j < length; ++j) {
      cached[j] += kept[j];
      add(weights[j], lost[j], kept[j]);
    }
  } else if (cached) {
    for (int64_t j = 0; j < length; ++j) {
      add(weights[j], lost[j], merged<kForm>(factor, alpha, kept[j], task[j]) - cached[j]);
      cached[j] = 0.0f;
    }
  } else {
    for (int64_t j = 0; j < length; ++j) {
      add(weights[j], lost[j], merged<kForm>(factor, alpha, kept[j], task[j]));
    }
  }
  for (size_t n = 0; n < deferred.size(); ++n) {
    weights[deferred[n]] = before[3 * n];
    lost[deferred[n]] = before[3 * n + 1];
    if (cached) cached[deferred[n]] = before[3 * n + 2];
  }
}

template <int kForm>
void apply_block(const MergingCall& c, int64_t begin, int64_t end, std::vector<int32_t>& deferred) {
  float step[kBlock], kept[kBlock];
  const int64_t length = end - begin;
  deferred.clear();
  steps(c, begin, end, step);
  if (!c.merges) return apply_dense<kForm>(c, begin, end, step, nullptr, deferred);
  if (kForm == kDare) {
    if (c.limit >> 32) {
      std::memcpy(kept, step, 4 * length);
    } else {
      keep_random(c, c.step_key, begin, end, step, kept);
    }
  } else {
    const int32_t low = int32_t(c.low), high = int32_t(c.high);
    uint32_t between = 0;
    for (int64_t j = 0; j < length; ++j) {
      const int32_t bits = int32_t(magnitude(step[j]));
      kept[j] = bits > high ? step[j] : 0.0f;
      between |= uint32_t(bits >= low) & uint32_t(bits <= high);
    }
    for (int64_t j = 0; between && j < length; ++j) {
      const int32_t bits = int32_t(magnitude(step[j]));
      if (bits >= low && bits <= high) deferred.push_back(int32_t(j));
    }
  }
  const bool all = c.task_type != kNoTask && !c.task_index && !c.fresh;
  if (all && c.task_type == kFloat32) {
    return apply_dense<kForm>(c, begin, end, kept, static_cast<const float*>(c.task) + begin,
                              deferred);
  }
  if (!all && !c.cached) {
    Entries entries;
    find_entries(c, begin, end, entries);
    return apply_sparse<kForm>(c, begin, end, kept, entries, deferred);
  }
  float task[kBlock] = {};
  if (all) {
    for (int64_t j = 0; j < length; ++j) task[j] = task_value(c, begin + j);
  } else {
    Entries entries;
    find_entries(c, begin, end, entries);
    for (int64_t n = 0; n < entries.count; ++n) task[entries.place[n]] = entries.value[n];
  }
  apply_dense<kForm>(c, begin, end, kept, task, deferred);
}

template <int kForm>
void apply(MergingCall& c) {
  std::atomic<int64_t> filled{0};
  parallel_for(c.count, kBlock, [&](int64_t begin, int64_t end) {
    thread_local std::vector<int32_t> deferred;
    apply_block<kForm>(c, begin, end, deferred);
    if (deferred.empty()) return;
    int64_t at = filled.fetch_add(int64_t(deferred.size()));
    for (const int32_t j : deferred) c.deferred[at++] = begin + j;
  });
  c.deferred_count = filled;
}

// Add the magnitudes of a range to a histogram. `slot` gives a magnitude's place, or a negative
// number. Each of a few long pieces has its own counts.
template <class Slot>
void histogram(const MergingCall& c, int64_t* counts, int64_t slots, const Slot& slot) {
  const int64_t pieces = std::min<int64_t>(WorkerPool::shared().threads(), (c.count >> 16) + 1);
  const int64_t grain = ((c.count + pieces - 1) / pieces + kBlock - 1) / kBlock * kBlock;
  std::vector<std::vector<uint32_t>> parts(pieces);
  parallel_for(c.count, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t>& part = parts[begin / grain];
    part.resize(slots);
    float step[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t stop = std::min(at + kBlock, end);
      steps(c, at, stop, step);
      for (int64_t j = 0; j < stop - at; ++j) {
        const int64_t where = slot(magnitude(step[j]));
        if (where >= 0) ++part[where];
      }
    }
  });
  for (const std::vector<uint32_t>& part : parts) {
    for (size_t n = 0; n < part.size(); ++n) counts[n] += part[n];
  }
}

}  // namespace
}  // namespace openqwen

// Merge the step with the task vector, after the moments' update where there is a gradient.
extern "C" void openqwen_merging_apply(openqwen::MergingCall* call) {
  using namespace openqwen;
  if (call->form == kDare) return apply<kDare>(*call);
  if (call->form == kTiesWeighted) return apply<kTiesWeighted>(*call);
  apply<kTiesUnweighted>(*call);
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
