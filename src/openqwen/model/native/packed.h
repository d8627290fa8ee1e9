// Quantised matrices at rest. [N, K] is cut into tiles of 32 outputs; a tile is one record after the other along K, a
// record holds a group of inputs: the outputs' scales (32 bfloat16), then their weights as unsigned bytes or nibbles.
//
// A byte's weight is scale · (byte − 128), a nibble's scale · kCode[nibble]. 64 bytes hold 4 inputs of 16 outputs (8 as
// nibbles: the group's first half low, its second half high), and the tile's two sixteens follow each other. N is padded
// with scales of zero; K with zeros (their bytes meet activations of zero).

#pragma once

#include <cstdint>

namespace openqwen {

constexpr int kTile = 32;
constexpr int kScales = 2 * kTile;  // bytes

constexpr int kZero = 128;  // what is added to a weight to make it an unsigned byte

struct Int8 {
  static constexpr bool kNibbles = false;
  static constexpr int kGroup = 64, kBytes = kScales + kTile * kGroup;
};

struct Int4 {
  static constexpr bool kNibbles = true;
  static constexpr int kGroup = 32, kBytes = kScales + kTile * kGroup / 2;
};

// The sixteen levels with the least squared error for normally distributed weights, scaled by the best of a few
// multiples of their group's largest (Lloyd's algorithm): a tenth less error than even steps.
constexpr int8_t kCode[16] = {-127, -100, -78, -61, -47, -34, -21, -9, 2, 13, 25, 36, 50, 65, 82, 106};

inline int64_t pieces(int64_t length, int64_t size) { return (length + size - 1) / size; }

}  // namespace openqwen
