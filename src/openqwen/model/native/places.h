// Values of some of a block's elements, side by side.
#pragma once

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

// Those values, and which elements have one.
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

}  // namespace
}  // namespace openqwen
