// Masks of sixteen lanes: in AVX-512, in AVX2, or in plain loops that the compiler vectorises.
#pragma once

#include "lanes.h"

namespace openqwen {
namespace {

using Mask = uint16_t;  // bit i belongs to lane i
constexpr Mask kAllLanes = 0xffff;
constexpr uint64_t kGamma = 0x9E3779B97F4A7C15;

// SplitMix64's finaliser, of a word or of a vector of words.
template <class Word>
inline Word mix(Word x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline int32_t magnitude_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffff;
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)

inline Lanes root(Lanes a) { return {_mm512_sqrt_ps(a.x)}; }
inline Mask above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GT_OQ); }
inline Mask reaches(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a.x, b.x, _CMP_GE_OQ); }
// a in the lanes of the mask, b in the others.
inline Lanes choose(Mask mask, Lanes a, Lanes b) {
  return {_mm512_mask_mov_ps(b.x, mask, a.x)};
}
inline Lanes keep(Mask mask, Lanes a) { return {_mm512_maskz_mov_ps(mask, a.x)}; }
// Lanes whose magnitude has bits above `bound`; they are in the order of the magnitudes.
inline Mask bits_above(Lanes a, int32_t bound) {
  return _mm512_cmpgt_epi32_mask(_mm512_castps_si512(_mm512_abs_ps(a.x)),
                                 _mm512_set1_epi32(bound));
}
// The lanes of the mask, side by side; sixteen floats at `to` may be written.
inline void compress(float* to, Mask mask, Lanes a) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(mask, a.x));
}
// The same of the lanes' numbers, counted from `first`.
inline void compress_places(int32_t* to, Mask mask, int32_t first) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(first));
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, places));
}
// The opposite: the first lanes of a, in the lanes of the mask.
inline Lanes expand(Lanes a, Mask mask) { return {_mm512_maskz_expand_ps(mask, a.x)}; }
// Sixteen bfloat16 numbers.
inline Lanes widen(const uint16_t* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))};
}
// The 32-bit halves, the lower first, of eight words of SplitMix64 that are at most `last`.
inline Mask random_lanes(uint64_t start, uint32_t last) {
  const __m512i steps = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set1_epi64(int64_t(kGamma)));
  __m512i x = _mm512_add_epi64(_mm512_set1_epi64(int64_t(start)), steps);
  x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 30)),
                         _mm512_set1_epi64(int64_t(0xBF58476D1CE4E5B9)));
  x = _mm512_mullo_epi64(_mm512_xor_si512(x, _mm512_srli_epi64(x, 27)),
                         _mm512_set1_epi64(int64_t(0x94D049BB133111EB)));
  x = _mm512_xor_si512(x, _mm512_srli_epi64(x, 31));
  return _mm512_cmple_epu32_mask(x, _mm512_set1_epi32(int32_t(last)));
}

#else

inline Lanes root(Lanes a) {
  float x[kLanes];
  store(x, a);
  for (float& value : x) value = std::sqrt(value);
  return load(x);
}
inline void compress_places(int32_t* to, Mask mask, int32_t first) {
  for (int i = 0; i < kLanes; ++i) {
    *to = first + i;
    to += mask >> i & 1;
  }
}
inline Lanes widen(const uint16_t* from) {
  float x[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = uint32_t(from[i]) << 16;
    std::memcpy(x + i, &bits, 4);
  }
  return load(x);
}

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)  // as Lanes has two halves

using Words = uint64_t __attribute__((vector_size(32)));

inline __m256 as_floats(__m256i x) { return _mm256_castsi256_ps(x); }
// The lanes of both halves whose highest bit is set.
inline Mask highest_bits(__m256 x, __m256 y) {
  return Mask(_mm256_movemask_ps(x) | _mm256_movemask_ps(y) << 8);
}
inline Mask above(Lanes a, Lanes b) {
  return highest_bits(_mm256_cmp_ps(a.x, b.x, _CMP_GT_OQ), _mm256_cmp_ps(a.y, b.y, _CMP_GT_OQ));
}
inline Mask reaches(Lanes a, Lanes b) {
  return highest_bits(_mm256_cmp_ps(a.x, b.x, _CMP_GE_OQ), _mm256_cmp_ps(a.y, b.y, _CMP_GE_OQ));
}
inline Lanes choose(Mask mask, Lanes a, Lanes b) {
  // A blend goes by each lane's highest bit: lane i's bit is shifted to there.
  const __m256i shift = _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31);
  const __m256i x = _mm256_sllv_epi32(_mm256_set1_epi32(mask), shift);
  const __m256i y = _mm256_sllv_epi32(_mm256_set1_epi32(mask >> 8), shift);
  return {_mm256_blendv_ps(b.x, a.x, as_floats(x)), _mm256_blendv_ps(b.y, a.y, as_floats(y))};
}
inline Mask bits_above(Lanes a, int32_t bound) {
  const Lanes m = magnitude(a);
  const __m256i least = _mm256_set1_epi32(bound);
  return highest_bits(as_floats(_mm256_cmpgt_epi32(_mm256_castps_si256(m.x), least)),
                      as_floats(_mm256_cmpgt_epi32(_mm256_castps_si256(m.y), least)));
}
// From which lane each lane takes its number, for each mask of eight lanes.
struct Orders {
  uint8_t compress[256][8] = {}, expand[256][8] = {};

  constexpr Orders() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int i = 0, next = 0; i < 8; ++i) {
        expand[mask][i] = uint8_t(next);
        if (mask >> i & 1) compress[mask][next++] = uint8_t(i);
      }
    }
  }
};
constexpr Orders kOrders;

inline __m256i order(const uint8_t (&lanes)[8]) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
}
inline void compress(float* to, Mask mask, Lanes a) {
  const __m256i x = order(kOrders.compress[mask & 255]), y = order(kOrders.compress[mask >> 8]);
  _mm256_storeu_ps(to, _mm256_permutevar8x32_ps(a.x, x));
  _mm256_storeu_ps(to + __builtin_popcount(mask & 255), _mm256_permutevar8x32_ps(a.y, y));
}
inline Lanes expand(Lanes a, Mask mask) {
  const __m256i x = order(kOrders.expand[mask & 255]);
  const __m256i y = _mm256_add_epi32(order(kOrders.expand[mask >> 8]),
                                     _mm256_set1_epi32(__builtin_popcount(mask & 255)));
  // A permutation goes by the lowest three bits. The fourth says that the lane is one of a.y.
  const __m256 upper = as_floats(_mm256_slli_epi32(y, 28));
  const __m256 second = _mm256_blendv_ps(_mm256_permutevar8x32_ps(a.x, y),
                                         _mm256_permutevar8x32_ps(a.y, y), upper);
  return choose(mask, {_mm256_permutevar8x32_ps(a.x, x), second}, all(0.0f));
}
inline Mask random_lanes(uint64_t start, uint32_t last) {
  const Words steps = {0, kGamma, 2 * kGamma, 3 * kGamma};
  const auto x = reinterpret_cast<__m256i>(mix(steps + start));
  const auto y = reinterpret_cast<__m256i>(mix(steps + (start + 4 * kGamma)));
  const __m256i most = _mm256_set1_epi32(int32_t(last));
  return highest_bits(as_floats(_mm256_cmpeq_epi32(_mm256_max_epu32(x, most), most)),
                      as_floats(_mm256_cmpeq_epi32(_mm256_max_epu32(y, most), most)));
}

#else

// Unlike shifts by i, these let loops vectorise where vectors have no shift for each lane.
constexpr uint32_t kBits[kLanes] = {1,   2,   4,    8,    16,   32,   64,    128,
                                    256, 512, 1024, 2048, 4096, 8192, 16384, 32768};

template <class Test>
inline Mask where(const Test& test) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= test(i) ? kBits[i] : 0;
  return Mask(mask);
}
inline Mask above(Lanes a, Lanes b) {
  float x[kLanes], y[kLanes];
  store(x, a);
  store(y, b);
  return where([&](int i) { return x[i] > y[i]; });
}
inline Mask reaches(Lanes a, Lanes b) {
  float x[kLanes], y[kLanes];
  store(x, a);
  store(y, b);
  return where([&](int i) { return x[i] >= y[i]; });
}
inline Lanes choose(Mask mask, Lanes a, Lanes b) {
  float x[kLanes], y[kLanes];
  store(x, a);
  store(y, b);
  for (int i = 0; i < kLanes; ++i) x[i] = mask & kBits[i] ? x[i] : y[i];
  return load(x);
}
inline Mask bits_above(Lanes a, int32_t bound) {
  float x[kLanes];
  store(x, a);
  return where([&](int i) { return magnitude_bits(x[i]) > bound; });
}
inline void compress(float* to, Mask mask, Lanes a) {
  float x[kLanes];
  store(x, a);
  for (int i = 0; i < kLanes; ++i) {
    *to = x[i];
    to += mask >> i & 1;
  }
}
inline Lanes expand(Lanes a, Mask mask) {
  float x[kLanes], y[kLanes];
  store(x, a);
  for (int i = 0, next = 0; i < kLanes; ++i) {
    y[i] = mask >> i & 1 ? x[next] : 0.0f;
    next += mask >> i & 1;
  }
  return load(y);
}
inline Mask random_lanes(uint64_t start, uint32_t last) {
  uint64_t words[kLanes / 2];
  for (int i = 0; i < kLanes / 2; ++i) words[i] = mix(start + uint64_t(i) * kGamma);
  uint32_t mask = 0;  // by shifts: here `where` takes longer
  for (int i = 0; i < kLanes; ++i) {
    mask |= uint32_t(uint32_t(words[i / 2] >> (i % 2 * 32)) <= last) << i;
  }
  return Mask(mask);
}

#endif

inline Lanes keep(Mask mask, Lanes a) { return choose(mask, a, all(0.0f)); }

#endif

}  // namespace
}  // namespace openqwen
