// The packed form of quantised matrices.
//
// A matrix [N outputs, K inputs] is cut into tiles of 32 outputs. A tile is a sequence of records
// along K. A record holds one group of inputs: first the scales of the 32 outputs (bfloat16), then
// their weights as unsigned bytes or nibbles. So a product reads memory from front to back.
//
// A byte stands for scale · (byte − 128), a nibble for scale · kCode[nibble]. Each run of 64 bytes
// holds 4 inputs of 16 outputs, which is what one AVX-512 dot-product instruction takes; the runs
// of the tile's two halves of 16 outputs alternate. As nibbles 64 bytes hold 8 inputs: those of the
// group's first half in the low nibbles, those of its second half in the high ones.
// N is padded with scales of zero. K is padded with zeros, which meet activations of zero.

#pragma once

#include <cstdint>

namespace openqwen {

constexpr int kTile = 32;
constexpr int kScales = 2 * kTile;  // bytes

constexpr int kZero = 128;  // added to a signed weight to make it an unsigned byte

struct Int8 {
  static constexpr bool kNibbles = false;
  static constexpr int kGroup = 64, kBytes = kScales + kTile * kGroup;
};

struct Int4 {
  static constexpr bool kNibbles = true;
  static constexpr int kGroup = 32, kBytes = kScales + kTile * kGroup / 2;
};

// The sixteen levels with the least squared error for normally distributed weights, when each group
// is scaled by the best of a few multiples of its largest weight (Lloyd's algorithm). Their error
// is a tenth less than that of evenly spaced levels.
constexpr int8_t kCode[16] = {-127, -100, -78, -61, -47, -34, -21, -9,
                              2,    13,   25,  36,  50,  65,  82,  106};

inline int64_t pieces(int64_t length, int64_t size) { return (length + size - 1) / size; }

}  // namespace openqwen
