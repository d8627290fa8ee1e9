// Packs a matrix (packed.h).
//
// In 8 bits a group's scale is its largest weight / 127. In 4 bits it is searched: a few candidates
// are each refitted by least squares, and the one with the least squared error is taken. packed.py
// does the same in plain PyTorch; the two may choose differently between equally good candidates.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "packed.h"
#include "pool.h"
#include "simd.h"

namespace openqwen {
namespace {

enum Type : int64_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7FFF;
  // Times 2^112, the difference of the exponents' biases; as a product it is right for subnormal
  // halves too.
  const float magnitude = from_bits(rest << 13) * from_bits(0x77800000);
  return from_bits(to_bits(rest < 0x7C00 ? magnitude : from_bits(rest << 13 | 0x7F800000)) | sign);
}

void read(const void* matrix, int64_t type, int64_t first, int64_t count, float* out) {
  if (type == kFloat32) {
    std::memcpy(out, static_cast<const float*>(matrix) + first, count * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(matrix) + first;
  if (type == kBfloat16) {
    for (int64_t k = 0; k < count; ++k) out[k] = from_bits(uint32_t(from[k]) << 16);
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = half_to_float(from[k]);
  }
}

// The nearest bfloat16 (halves to even), as a float32.
float rounded(float value) {
  const uint32_t bits = to_bits(value);
  return from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
}

float largest(const float* w, int count) {
  float most = 0;
  for (int k = 0; k < count; ++k) {
    if (std::fabs(w[k]) > std::fabs(most)) most = w[k];
  }
  return most;
}

// Returns the scale of a group in 8 bits and writes its weights to `stored`.
float choose(const float* w, uint8_t* stored) {
  // Rounded up to bfloat16, so that the largest weight stays within 127.
  const float exact = std::fabs(largest(w, Int8::kGroup)) / 127.0f;
  const float scale = from_bits((to_bits(exact) + 0xFFFF) & 0xFFFF0000),
              inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int k = 0; k < Int8::kGroup; ++k) {
    stored[k] =
        uint8_t(int32_t(std::min(std::max(nearest(w[k] * inverse), -127.0f), 127.0f)) + 128);
  }
  return scale;
}

// The candidates: values, in units of the code, that a group's largest weight may become. A
// negative one reverses the sign of the group, because the code is not symmetric.
constexpr float kLargest[] = {-135.0f, -122.0f, -110.0f, 100.0f, 112.0f, 125.0f};
constexpr int kLanes = 16;  // outputs whose groups are searched at once

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Places = int32_t __attribute__((vector_size(4 * kLanes)));

inline Places same_bits(Lanes x) { return reinterpret_cast<Places>(x); }
inline Lanes chosen(Places where, Lanes x, Lanes y) {
  return reinterpret_cast<Lanes>((where & same_bits(x)) | (~where & same_bits(y)));
}
inline Lanes all(float x) { return Lanes{} + x; }
inline Lanes absolute(Lanes x) { return reinterpret_cast<Lanes>(same_bits(x) & 0x7FFFFFFF); }
inline Lanes inverse_of(Lanes x) { return chosen(absolute(x) > 1e-30f, 1.0f / x, Lanes{}); }

// The level of the code that is nearest to each x; `nearest_place` gives its index. A level is
// built from the differences at the thresholds that x exceeds, which needs no table look-up.
inline Lanes nearest_level(Lanes x) {
  Lanes level = all(kCode[0]);
#pragma GCC unroll 15
  for (int j = 0; j < 15; ++j) {
    const Places above = x > 0.5f * float(kCode[j] + kCode[j + 1]);
    level += reinterpret_cast<Lanes>(above & same_bits(all(float(kCode[j + 1] - kCode[j]))));
  }
  return level;
}

inline Places nearest_place(Lanes x) {
  Places place{};
#pragma GCC unroll 15
  for (int j = 0; j < 15; ++j) place -= x > 0.5f * float(kCode[j] + kCode[j + 1]);
  return place;
}

// w: [kGroup]. Returns the scale of each lane and writes the indices into the code, [kGroup].
Lanes search(const Lanes* w, Places* place) {
  Lanes most{}, best = all(-1.0f), scale{};
  for (int k = 0; k < Int4::kGroup; ++k) most = chosen(absolute(w[k]) > absolute(most), w[k], most);
  const Lanes inverse = inverse_of(most);
  for (float target : kLargest) {
    const Lanes factor = inverse * target;
    Lanes wq{}, qq{};
    for (int k = 0; k < Int4::kGroup; ++k) {
      const Lanes q = nearest_level(w[k] * factor);
      wq += w[k] * q;
      qq += q * q;
    }
    const Lanes fitted = wq / qq, gain = wq * fitted;
    const Places better = gain > best;
    best = chosen(better, gain, best);
    scale = chosen(better, fitted, scale);
  }
  for (int i = 0; i < kLanes; ++i) scale[i] = rounded(scale[i]);
  const Lanes last = inverse_of(scale);
  for (int k = 0; k < Int4::kGroup; ++k) place[k] = nearest_place(w[k] * last);
  return scale;
}

void put_scale(uint8_t* record, int row, float scale) {
  const uint16_t high = uint16_t(to_bits(scale) >> 16);
  std::memcpy(record + 2 * row, &high, 2);
}

// The address, among a record's weights, of the four inputs from k on of one output.
uint8_t* place(uint8_t* weights, int row, int k) {
  return weights + (k / 4 * 2 + row / 16) * 64 + row % 16 * 4;
}

// Packs the weights of 32 outputs, [kTile, padded], one record for each group.
void tile_of(Int8, const std::vector<float>& w, int64_t padded, uint8_t* tile) {
  uint8_t stored[Int8::kGroup];
  for (int64_t at = 0; at < padded; at += Int8::kGroup, tile += Int8::kBytes) {
    for (int r = 0; r < kTile; ++r) {
      put_scale(tile, r, choose(w.data() + r * padded + at, stored));
      for (int k = 0; k < Int8::kGroup; k += 4)
        std::memcpy(place(tile + kScales, r, k), stored + k, 4);
    }
  }
}

void tile_of(Int4, const std::vector<float>& w, int64_t padded, uint8_t* tile) {
  constexpr int kHalf = Int4::kGroup / 2;
  Lanes columns[Int4::kGroup];
  Places code[Int4::kGroup];
  for (int64_t at = 0; at < padded; at += Int4::kGroup, tile += Int4::kBytes) {
    for (int first = 0; first < kTile; first += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        const float* from = w.data() + (first + i) * padded + at;
        for (int k = 0; k < Int4::kGroup; ++k) columns[k][i] = from[k];
      }
      const Lanes scale = search(columns, code);
      for (int i = 0; i < kLanes; ++i) put_scale(tile, first + i, scale[i]);
      for (int k = 0; k < kHalf; ++k) {
        const Places both = code[k] | code[kHalf + k] << 4;
        uint8_t* to = place(tile + kScales, first, k / 4 * 4) + k % 4;
        for (int i = 0; i < kLanes; ++i) to[4 * i] = uint8_t(both[i]);
      }
    }
  }
}

template <class Format>
void quantize(const void* matrix, int64_t type, int64_t n, int64_t k, uint8_t* packed) {
  const int64_t groups = pieces(k, Format::kGroup), padded = groups * Format::kGroup;
  parallel_for(pieces(n, kTile), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(kTile * padded);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kTile, count = std::min<int64_t>(kTile, n - first);
      if (count < kTile) std::fill(rows.begin(), rows.end(), 0.0f);
      for (int64_t r = 0; r < count; ++r)
        read(matrix, type, (first + r) * k, k, rows.data() + r * padded);
      tile_of(Format{}, rows, padded, packed + t * groups * Format::kBytes);
    }
  });
}

}  // namespace
}  // namespace openqwen

extern "C" {

// matrix [n, k] of float32 (type 0), bfloat16 (1) or float16 (2); packed: see packed.h.
void openqwen_quantize(const void* matrix, int64_t type, int64_t n, int64_t k, int64_t bits,
                       uint8_t* packed) {
  auto quantize =
      bits == 8 ? openqwen::quantize<openqwen::Int8> : openqwen::quantize<openqwen::Int4>;
  quantize(matrix, type, n, k, packed);
}
}
