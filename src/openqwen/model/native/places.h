// Some of a block's elements: their values side by side, their bits, and their places.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "masks.h"

namespace openqwen {
namespace {

constexpr int64_t kBlock = 4096;
constexpr int64_t kGroups = kBlock / kLanes;

inline Lanes sixteen(const float* from) { return load(from); }
inline Lanes sixteen(const uint16_t* from) { return widen(from); }

// The first `count` numbers, at most sixteen; zeros in the other lanes.
template <class Value>
inline Lanes up_to(const Value* from, int64_t count) {
  if (count >= kLanes) return sixteen(from);
  Value copy[kLanes] = {};
  std::memcpy(copy, from, sizeof(Value) * size_t(count));
  return sixteen(copy);
}

// Values of some of a block's elements, side by side.
template <class Value>
struct Packed {
  const Mask* lanes = nullptr;
  const Value* next = nullptr;

  Packed(const Mask* all_lanes, const int64_t* starts, const void* values, int64_t begin) {
    if (!all_lanes) return;
    lanes = all_lanes + begin / kLanes;
    next = static_cast<const Value*>(values) + starts[begin / kBlock];
  }

  // Those of the next sixteen elements, of which `mask` has one each.
  Lanes take(Mask mask) {
    const Lanes values = expand(sixteen(next), mask);
    next += __builtin_popcount(mask);
    return values;
  }
};

// Elements of a block as bits, sixty-four in a word.
struct Bits {
  uint64_t words[kBlock / 64] = {};

  void set(int64_t group, Mask lanes) {
    words[group / 4] |= uint64_t(lanes) << (group % 4 * kLanes);
  }
  int64_t count() const {
    int64_t total = 0;
    for (uint64_t word : words) total += __builtin_popcountll(word);
    return total;
  }
  bool has(int64_t place) const { return words[place / 64] >> (place % 64) & 1; }
};

// Calls body(place) for each bit of `bits` that is not in `but`, in order.
template <class Body>
inline void each_bit(const Bits& bits, const Bits& but, const Body& body) {
  for (int64_t w = 0; w < kBlock / 64; ++w) {
    for (uint64_t left = bits.words[w] & ~but.words[w]; left; left &= left - 1) {
      body(w * 64 + __builtin_ctzll(left));
    }
  }
}

// Places of a block's elements, of which sixteen are worked on at a time.
struct Places {
  uint16_t at[kBlock + kLanes];
  int64_t count = 0;

  void push(int64_t place) { at[count++] = uint16_t(place); }
  int size(int64_t k) const { return int(std::min<int64_t>(kLanes, count - k)); }
  // Those from the k-th on; zeros in the lanes behind the last.
  Lanes gather(const float* from, int64_t k) const {
    float x[kLanes] = {};
    for (int i = 0; i < size(k); ++i) x[i] = from[at[k + i]];
    return load(x);
  }
  void scatter(float* to, int64_t k, Lanes values) const {
    float x[kLanes];
    store(x, values);
    for (int i = 0; i < size(k); ++i) to[at[k + i]] = x[i];
  }
};

}  // namespace
}  // namespace openqwen
