// Many rows times a tile where a processor has AVX2 but no exact product of bytes.
//
// Its products of 16-bit numbers are exact. A part of a tile is widened to 16 bits once for all
// rows, and stays in the first cache while they pass by; the rows are widened once for all tiles.
// Sums of integers are exact and groups are added in ascending order, so the bits are those of
// `block` in linear.cpp.
//
// In a run of four inputs, inputs 0 and 2 stand together, and inputs 1 and 3: what splitting bytes
// into even and odd ones gives. One instruction multiplies such pairs for eight outputs.

#pragma once

#include <algorithm>

#include "packed.h"
#include "simd.h"

#if defined(__AVX2__) && defined(__FMA__)

namespace openqwen {

constexpr int kWidenedRows = 2;               // of a register block: eight sums of eight outputs
constexpr int kWidenedWeights = 256 * kTile;  // of a tile at a time: 16 KiB, half a first cache

struct Widened : Avx2 {
  static constexpr bool kWidens = true;

  // count is a multiple of 16.
  static void widen_row(const int8_t* from, int64_t count, int16_t* to) {
    const __m128i order = _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    for (int64_t k = 0; k < count; k += 16) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + k));
      const __m256i wide = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, order));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), wide);
    }
  }

  // Four inputs of 32 outputs, 128 bytes, to [2 pairs, 32 outputs, 2].
  static void widen_four(const Avx2::W* from, int16_t* to) {
    auto out = reinterpret_cast<__m256i*>(to);
    for (int v = 0; v < 4; ++v) {
      const __m256i bytes = from[v / 2].half[v % 2];
      _mm256_store_si256(out + v, _mm256_and_si256(bytes, _mm256_set1_epi16(255)));
      _mm256_store_si256(out + 4 + v, _mm256_srli_epi16(bytes, 8));
    }
  }

  // The weights of one record to [kGroup / 2 pairs, 32 outputs, 2].
  template <class Format>
  static void widen_record(const uint8_t* record, int16_t* to) {
    const uint8_t* weights = record + kScales;
    const int stored = Format::kNibbles ? Format::kGroup / 2 : Format::kGroup;
    for (int k = 0; k < stored; k += 4, weights += 128) {
      const Avx2::W from[2] = {Avx2::load(weights), Avx2::load(weights + 64)};
      if constexpr (Format::kNibbles) {
        const Avx2::W low[2] = {Avx2::low(from[0]), Avx2::low(from[1])};
        const Avx2::W high[2] = {Avx2::high(from[0]), Avx2::high(from[1])};
        widen_four(low, to + k * kTile);
        widen_four(high, to + (stored + k) * kTile);
      } else {
        widen_four(from, to + k * kTile);
      }
    }
  }

  // Adds one group of a few rows to `sums`, [Rows, 32]; `width` is the distance of two rows.
  template <class Format, int Rows>
  static void add_group(const uint8_t* record, const int16_t* weights, const int16_t* rows,
                        int64_t width, const Group* group, int64_t groups, float (*sums)[kTile]) {
    __m256i dots[Rows][4];
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < 4; ++v) dots[r][v] = _mm256_set1_epi32(group[r * groups].offset);
    }
#pragma GCC unroll 4
    for (int k = 0; k < Format::kGroup; k += 2) {
      auto pair = reinterpret_cast<const __m256i*>(weights + k * kTile);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
        int32_t two;
        std::memcpy(&two, rows + r * width + k, 4);
        const __m256i a = _mm256_set1_epi32(two);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const __m256i products = _mm256_madd_epi16(_mm256_load_si256(pair + v), a);
          dots[r][v] = _mm256_add_epi32(dots[r][v], products);
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const Avx2::F scales = Avx2::bfloat16(record + half * kTile);
      for (int r = 0; r < Rows; ++r) {
        float* to = sums[r] + 16 * half;
        const Avx2::F sum = {_mm256_load_ps(to), _mm256_load_ps(to + 8)};
        const Avx2::I whole = {dots[r][2 * half], dots[r][2 * half + 1]};
        Avx2::store(to, Avx2::add(sum, whole, scales, group[r * groups].scale));
      }
    }
  }

  // All rows times one tile: sums, [count, 32], aligned to 32 bytes.
  template <class Format>
  static void tile(const uint8_t* records, const int16_t* rows, const Group* group, int64_t groups,
                   int64_t count, float (*sums)[kTile]) {
    constexpr int kPart = kWidenedWeights / (kTile * Format::kGroup);  // groups at a time
    constexpr int kRecord = kTile * Format::kGroup;                    // weights
    alignas(64) int16_t weights[kWidenedWeights];
    const int64_t width = groups * Format::kGroup;
    std::memset(sums, 0, count * sizeof(*sums));
    for (int64_t first = 0; first < groups; first += kPart) {
      const int64_t part = std::min<int64_t>(kPart, groups - first);
      for (int64_t i = 0; i < part; ++i) {
        widen_record<Format>(records + (first + i) * Format::kBytes, weights + i * kRecord);
      }
      for (int64_t m = 0; m < count; m += kWidenedRows) {
        auto add = m + 1 < count ? add_group<Format, kWidenedRows> : add_group<Format, 1>;
        for (int64_t i = 0; i < part; ++i) {
          const int64_t g = first + i;
          add(records + g * Format::kBytes, weights + i * kRecord,
              rows + m * width + g * Format::kGroup, width, group + m * groups + g, groups,
              sums + m);
        }
      }
    }
  }
};

}  // namespace openqwen

#endif
