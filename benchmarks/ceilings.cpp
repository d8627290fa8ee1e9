// What this machine can do at most: bytes read from memory, products of bytes added up. C ABI, called by ceilings.py.

#include <cstdint>
#include <initializer_list>

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

extern "C" {

// Reads 64 bytes at a time; returns something of all of them, so that nothing is left out.
int64_t read_all(const int64_t* from, int64_t count) {
  int64_t lane[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) lane[k] ^= from[i + k];
  }
  return lane[0] ^ lane[1] ^ lane[2] ^ lane[3] ^ lane[4] ^ lane[5] ^ lane[6] ^ lane[7];
}

// `rounds` times twelve independent VNNI instructions; returns the operations done (2 a product), 0 where there is none.
int64_t multiply_bytes(int64_t rounds) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  __m512i x = _mm512_set1_epi8(3), a = x, b = x, c = x, d = x, e = x, f = x, g = x, h = x, i = x, j = x, k = x, l = x;
  for (int64_t n = 0; n < rounds; ++n) {
    for (__m512i* sum : {&a, &b, &c, &d, &e, &f, &g, &h, &i, &j, &k, &l}) *sum = _mm512_dpbusd_epi32(*sum, x, x);
    asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f));
    asm volatile("" : "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));
  }
  return rounds * 12 * 128;
#else
  return 0 * rounds;
#endif
}
}
