// Integer products in sixteen lanes, in three builds: AVX512-VNNI, AVX2, portable C++.
//
// All give the same bits: integers add exactly, and floating-point steps are single operations (fma
// among them) in the order in which a kernel writes them.
//
// W: 64 unsigned bytes of weights, four for each lane. A: four signed bytes of activations, the
// same in every lane. I, F: an int32 or a float for each lane.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "packed.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace openqwen {

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// x rounded to the nearest integer, halves to even, for |x| < 2²². Adding 1.5 · 2²³ leaves no bits
// for a fraction. Unlike a library call these plain operations let loops vectorise.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// A group of a row of activations q · scale. Weights are stored as w + kZero, and
// Σ w q = Σ (w + kZero) q − kZero Σ q, so every sum of products starts at offset = −kZero Σ q.
struct Group {
  float scale;
  int32_t offset;
};

struct Portable {
  static constexpr int kRows = 1;         // of a register block
  static constexpr bool kWidens = false;  // has `widen_row` and `tile` of widened.h
  struct I {
    int32_t lane[16];
  };
  struct F {
    float lane[16];
  };
  using W = const uint8_t*;
  using A = const int8_t*;
  struct Nibbles {
    uint8_t byte[64];
  };

  static F zero() { return {}; }
  static I splat(int32_t value) {
    I out;
    for (int32_t& x : out.lane) x = value;
    return out;
  }
  static W load(const uint8_t* from) { return from; }
  static Nibbles low(const uint8_t* w) {
    Nibbles out;
    for (int i = 0; i < 64; ++i) out.byte[i] = uint8_t(kCode[w[i] & 15] + kZero);
    return out;
  }
  static Nibbles high(const uint8_t* w) {
    Nibbles out;
    for (int i = 0; i < 64; ++i) out.byte[i] = uint8_t(kCode[w[i] >> 4] + kZero);
    return out;
  }
  static A four(const int8_t* from) { return from; }
  static I dot(I sum, const uint8_t* w, A a) {
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 4; ++k) sum.lane[i] += int32_t(w[4 * i + k]) * a[k];
    }
    return sum;
  }
  static I dot(I sum, const Nibbles& w, A a) { return dot(sum, w.byte, a); }
  static F bfloat16(const uint8_t* from) {
    F out;
    for (int i = 0; i < 16; ++i)
      out.lane[i] = from_bits(uint32_t(from[2 * i] | from[2 * i + 1] << 8) << 16);
    return out;
  }
  // sum + products · (w · a): a group's integer sum of products, scaled by both scales.
  static F add(F sum, const I& whole, const F& w, float a) {
    for (int i = 0; i < 16; ++i)
      sum.lane[i] = std::fma(float(whole.lane[i]), w.lane[i] * a, sum.lane[i]);
    return sum;
  }
  static void store(float* to, const F& value) { std::memcpy(to, value.lane, 64); }
};

#if defined(__AVX2__) && defined(__FMA__)
// kCode as unsigned bytes.
inline __m128i code_bytes() {
  const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCode));
  return _mm_xor_si128(code, _mm_set1_epi8(int8_t(kZero)));
}

struct Avx2 {
  static constexpr int kRows = 2;
  struct I {
    __m256i half[2];
  };
  struct F {
    __m256 half[2];
  };
  struct W {
    __m256i half[2];
  };
  // Bytes 0 and 2, and bytes 1 and 3, as 16-bit numbers: AVX2's own product of bytes saturates at
  // 16 bits, so bytes are multiplied as 16-bit numbers instead.
  struct A {
    __m256i even, odd;
  };

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static I splat(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
  static W load(const uint8_t* from) {
    auto at = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
  }
  static W low(W w) {
    const __m256i mask = _mm256_set1_epi8(15), code = _mm256_broadcastsi128_si256(code_bytes());
    return {_mm256_shuffle_epi8(code, _mm256_and_si256(w.half[0], mask)),
            _mm256_shuffle_epi8(code, _mm256_and_si256(w.half[1], mask))};
  }
  static W high(W w) {
    return low({_mm256_srli_epi16(w.half[0], 4), _mm256_srli_epi16(w.half[1], 4)});
  }
  static A four(const int8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, 4);
    const __m256i all = _mm256_set1_epi32(bytes);
    return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
  }
  static I dot(I sum, W w, A a) {
    for (int h = 0; h < 2; ++h) {
      const __m256i even = _mm256_and_si256(w.half[h], _mm256_set1_epi16(255));
      const __m256i odd = _mm256_srli_epi16(w.half[h], 8);
      sum.half[h] = _mm256_add_epi32(sum.half[h], _mm256_add_epi32(_mm256_madd_epi16(even, a.even),
                                                                   _mm256_madd_epi16(odd, a.odd)));
    }
    return sum;
  }
  static F bfloat16(const uint8_t* from) {
    auto at = reinterpret_cast<const __m128i*>(from);
    F out;
    for (int h = 0; h < 2; ++h) {
      const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at + h));
      out.half[h] = _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    return out;
  }
  static F add(F sum, I whole, F w, float a) {
    for (int h = 0; h < 2; ++h) {
      sum.half[h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole.half[h]),
                                    _mm256_mul_ps(w.half[h], _mm256_set1_ps(a)), sum.half[h]);
    }
    return sum;
  }
  static void store(float* to, F value) {
    _mm256_storeu_ps(to, value.half[0]);
    _mm256_storeu_ps(to + 8, value.half[1]);
  }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
struct Avx512 {
  static constexpr int kRows = 6;
  static constexpr bool kWidens = false;
  using I = __m512i;
  using F = __m512;
  using W = __m512i;
  using A = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static I splat(int32_t value) { return _mm512_set1_epi32(value); }
  static W load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static W low(W w) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(code_bytes()),
                               _mm512_and_si512(w, _mm512_set1_epi8(15)));
  }
  static W high(W w) { return low(_mm512_srli_epi16(w, 4)); }
  static A four(const int8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, 4);
    return _mm512_set1_epi32(bytes);
  }
  static I dot(I sum, W w, A a) { return _mm512_dpbusd_epi32(sum, w, a); }
  static F bfloat16(const uint8_t* from) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static F add(F sum, I whole, F w, float a) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), _mm512_mul_ps(w, _mm512_set1_ps(a)), sum);
  }
  static void store(float* to, F value) { _mm512_storeu_ps(to, value); }
};
#endif

}  // namespace openqwen
