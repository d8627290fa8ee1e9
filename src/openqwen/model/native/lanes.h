// Vectors of sixteen floats: in AVX-512, in AVX2, or in plain loops that the compiler vectorises.
//
// An operation gives each lane the same result whatever the other lanes hold, and sums over lanes
// follow one fixed tree. So results do not depend on how rows were grouped.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace openqwen {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

constexpr int kRows = 8;  // rows that a micro-kernel takes at once: as many as fit the registers

struct Lanes {
  __m512 x;
};
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a.x); }
inline Lanes all(float a) { return {_mm512_set1_ps(a)}; }
inline Lanes from_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
inline Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.x, b.x)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.x, b.x)}; }
inline Lanes magnitude(Lanes a) { return {_mm512_abs_ps(a.x)}; }
inline void to_int8(int8_t* p, Lanes a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.x)));
}
inline Lanes rounded(Lanes a) { return {_mm512_roundscale_ps(a.x, 0)}; }
// a · 2ⁿ for whole n.
inline Lanes times_power(Lanes a, Lanes n) { return {_mm512_scalef_ps(a.x, n.x)}; }
// The first `count` lanes of a, the others `rest`.
inline Lanes first(Lanes a, int count, float rest) {
  const __mmask16 mask = count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
  return {_mm512_mask_mov_ps(_mm512_set1_ps(rest), mask, a.x)};
}

#elif defined(__AVX2__) && defined(__FMA__)

constexpr int kRows = 4;

struct Lanes {
  __m256 x, y;
};
inline Lanes load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Lanes a) {
  _mm256_storeu_ps(p, a.x);
  _mm256_storeu_ps(p + 8, a.y);
}
inline Lanes all(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline Lanes from_int8(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline Lanes operator*(Lanes a, Lanes b) {
  return {_mm256_mul_ps(a.x, b.x), _mm256_mul_ps(a.y, b.y)};
}
inline Lanes operator+(Lanes a, Lanes b) {
  return {_mm256_add_ps(a.x, b.x), _mm256_add_ps(a.y, b.y)};
}
inline Lanes operator-(Lanes a, Lanes b) {
  return {_mm256_sub_ps(a.x, b.x), _mm256_sub_ps(a.y, b.y)};
}
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.x, b.x, c.x), _mm256_fmadd_ps(a.y, b.y, c.y)};
}
inline Lanes operator/(Lanes a, Lanes b) {
  return {_mm256_div_ps(a.x, b.x), _mm256_div_ps(a.y, b.y)};
}
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.x, b.x), _mm256_max_ps(a.y, b.y)}; }
inline Lanes magnitude(Lanes a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.x), _mm256_andnot_ps(sign, a.y)};
}
inline void to_int8(int8_t* p, Lanes a) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(a.x), _mm256_cvtps_epi32(a.y));
  const __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline Lanes rounded(Lanes a) { return {_mm256_round_ps(a.x, 0x8), _mm256_round_ps(a.y, 0x8)}; }
inline __m256 times_power(__m256 a, __m256 n) {
  const __m256i bits =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  const __m256 small = _mm256_cmp_ps(n, _mm256_set1_ps(-126.0f), _CMP_LT_OQ);
  return _mm256_andnot_ps(small, _mm256_mul_ps(a, _mm256_castsi256_ps(bits)));
}
inline Lanes times_power(Lanes a, Lanes n) {
  return {times_power(a.x, n.x), times_power(a.y, n.y)};
}
inline Lanes first(Lanes a, int count, float rest) {
  alignas(32) float x[kLanes];
  store(x, a);
  for (int i = count; i < kLanes; ++i) x[i] = rest;
  return load(x);
}

#else

constexpr int kRows = 4;

struct Lanes {
  float x[kLanes];
};
#define OPENQWEN_EACH(expression)                       \
  Lanes r;                                              \
  for (int i = 0; i < kLanes; ++i) r.x[i] = expression; \
  return r
inline Lanes load(const float* p) { OPENQWEN_EACH(p[i]); }
inline void store(float* p, Lanes a) { std::memcpy(p, a.x, sizeof a.x); }
inline Lanes all(float a) { OPENQWEN_EACH(a); }
inline Lanes from_int8(const int8_t* p) { OPENQWEN_EACH(p[i]); }
inline Lanes operator*(Lanes a, Lanes b) { OPENQWEN_EACH(a.x[i] * b.x[i]); }
inline Lanes operator+(Lanes a, Lanes b) { OPENQWEN_EACH(a.x[i] + b.x[i]); }
inline Lanes operator-(Lanes a, Lanes b) { OPENQWEN_EACH(a.x[i] - b.x[i]); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { OPENQWEN_EACH(a.x[i] * b.x[i] + c.x[i]); }
inline Lanes operator/(Lanes a, Lanes b) { OPENQWEN_EACH(a.x[i] / b.x[i]); }
inline Lanes larger(Lanes a, Lanes b) { OPENQWEN_EACH(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }
inline Lanes magnitude(Lanes a) { OPENQWEN_EACH(std::fabs(a.x[i])); }
inline void to_int8(int8_t* p, Lanes a) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(std::nearbyint(a.x[i]));
}
inline Lanes rounded(Lanes a) { OPENQWEN_EACH(std::nearbyint(a.x[i])); }
inline Lanes times_power(Lanes a, Lanes n) {
  OPENQWEN_EACH(n.x[i] < -126 ? 0.0f : std::ldexp(a.x[i], static_cast<int>(n.x[i])));
}
inline Lanes first(Lanes a, int count, float rest) { OPENQWEN_EACH(i < count ? a.x[i] : rest); }
#undef OPENQWEN_EACH

#endif

// a · b + c, rounded once where the processor has fma. It is written out because a compiler that
// may choose (-ffp-contract) could choose differently in each loop.
inline float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// The sum of the lanes, folded in halves: (x₀ + x₈) + (x₄ + x₁₂) …
inline float sum(Lanes a) {
#if defined(__AVX512F__)
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.x), 1));
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(a.x), upper);
  const __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  const __m128 w = _mm_add_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_add_ss(w, _mm_movehdup_ps(w)));
#else
  float x[kLanes];
  store(x, a);
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
#endif
}

inline float largest(Lanes a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(a.x);
#else
  float x[kLanes];
  store(x, a);
  for (int n = kLanes / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
#endif
}

// eˣ for x ≤ 88, to about 2 units in the last place (Cephes' polynomial). Exactly 0 from about −104
// down, so also at −∞. NaN for NaN.
inline Lanes exp(Lanes x) {
  x = larger(all(-110.0f), x);  // in this order NaN stays NaN
  const Lanes n = rounded(x * all(1.44269504088896341f));
  const Lanes r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
  Lanes y = all(1.9875691500e-4f);
  for (float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = fma(y, r, all(c));
  return times_power(fma(y, r * r, r + all(1.0f)), n);
}

}  // namespace
}  // namespace openqwen
