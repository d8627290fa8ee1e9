// Sums of exponentials over blocks of the vocabulary, from which normalisers and random draws are
// made. Two passes over a row of scores; neither writes anything as wide as the vocabulary.

#include "lanes.h"
#include "pool.h"

extern "C" {

// For each row the largest score, and over each block the sum of exp((x − peak) / temperature).
//
// scores: `rows` rows of `width` floats, `stride` apart; width is a multiple of block, and block of
// 16. peaks: [rows]; sums: [rows, width / block].
void openqwen_block_sums(const float* scores, int64_t rows, int64_t stride, int64_t width,
                         int64_t block, const float* temperatures, float* peaks, float* sums) {
  using namespace openqwen;
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = scores + row * stride;
      Lanes most = load(x);
      for (int64_t i = kLanes; i < width; i += kLanes) most = larger(most, load(x + i));
      const float peak = peaks[row] = largest(most);
      const Lanes top = all(peak), inverse = all(1 / temperatures[row]);
      float* out = sums + row * (width / block);
      for (int64_t start = 0; start < width; start += block) {
        Lanes total = all(0);
        for (int64_t i = start; i < start + block; i += kLanes)
          total = total + exp((load(x + i) - top) * inverse);
        *out++ = sum(total);
      }
    }
  });
}
}
