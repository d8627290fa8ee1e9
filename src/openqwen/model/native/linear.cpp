// y = W f(x) + bias (+ residual) with a quantised W; f is nothing, RMSNorm or SwiGLU.
//
// f(x) is rounded to signed bytes, with one scale for each group of each row. Within a group bytes
// are multiplied and added exactly, as integers; the groups' sums are scaled and added in float32,
// in ascending order. So an output depends on its own row and on the weights alone: the same bits
// in any batch, on any number of threads, with any of the three instruction sets.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "layers.h"
#include "packed.h"
#include "pool.h"
#include "simd.h"
#include "widened.h"

namespace openqwen {
namespace {

constexpr int64_t kSlab = 512;                 // rows that are held as bytes at one time
constexpr int64_t kCached = 384 * 1024;        // bytes of activations that stay in a core's cache
constexpr int64_t kManyRows = 4;               // from here on widened.h is faster, where it is used
constexpr int64_t kRoundedInputs = 32 * 1024;  // inputs that a thread rounds at a time, at least

// The first `count` numbers, at most sixteen; the other lanes are 0.
Lanes load_up_to(const float* x, int64_t count) {
  if (count >= kLanes) return load(x);
  float some[kLanes] = {};
  std::copy(x, x + count, some);
  return load(some);
}

// rms_norm and swiglu write full vectors of sixteen to `out`; beyond the width they write zeros.
void rms_norm(const float* x, const LinearCall& linear, float* out) {
  const int64_t width = linear.inputs;
  Lanes squares = all(0);
  for (int64_t k = 0; k < width; k += kLanes) {
    const Lanes v = load_up_to(x + k, width - k);
    squares = squares + v * v;
  }
  const Lanes inverse = all(1.0f / std::sqrt(sum(squares) / float(width) + float(linear.eps)));
  for (int64_t k = 0; k < width; k += kLanes) {
    store(out + k, load_up_to(x + k, width - k) * inverse * load_up_to(linear.norm + k, width - k));
  }
}

// x: gate and up, [2 · width].
void swiglu(const float* x, int64_t width, float* out) {
  for (int64_t k = 0; k < width; k += kLanes) {
    const Lanes gate = load_up_to(x + k, width - k), up = load_up_to(x + width + k, width - k);
    const Lanes power = exp(all(0) - larger(all(-88.0f), gate));
    store(out + k, gate / (all(1) + power) * up);
  }
}

// Rounds a group to bytes. A group with a NaN or an infinite number gets the scale NaN.
template <class Format>
Group to_bytes(const float* x, int8_t* out) {
  Lanes most = all(0), nothing = all(0);
  for (int k = 0; k < Format::kGroup; k += kLanes) {
    const Lanes v = load(x + k);
    most = larger(magnitude(v), most);
    nothing = nothing + v * all(0);  // 0 · v is NaN where v is NaN or infinite
  }
  const float top = largest(most), scale = top / 127.0f + sum(nothing);
  if (scale != scale) return {scale, 0};
  const Lanes inverse = all(top > 1e-30f ? 127.0f / top : 0.0f);
  Lanes total = all(0);
  for (int k = 0; k < Format::kGroup; k += kLanes) {
    const Lanes q = rounded(load(x + k) * inverse);
    to_int8(out + k, q);
    total = total + q;
  }
  return {scale, -kZero * int32_t(sum(total))};
}

// The bytes of some rows, [rows, groups · kGroup], and their groups, [rows, groups].
struct Activations {
  std::vector<int8_t> bytes;
  std::vector<int16_t> widened;  // the bytes as widened.h wants them, where it is used
  std::vector<Group> groups;
};

template <class Format>
void prepare(const LinearCall& linear, const float* x, int64_t rows, Activations& to) {
  const int64_t groups = pieces(linear.inputs, Format::kGroup), padded = groups * Format::kGroup;
  const int64_t stride = linear.transform == kSwiglu ? 2 * linear.inputs : linear.inputs;
  to.bytes.resize(rows * padded);
  to.groups.resize(rows * groups);
  parallel_for(rows, pieces(kRoundedInputs, padded), [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> row;
    row.assign(padded, 0.0f);
    for (int64_t m = begin; m < end; ++m) {
      const float* from = x + m * stride;
      if (linear.transform == kRmsNorm) rms_norm(from, linear, row.data());
      if (linear.transform == kSwiglu) swiglu(from, linear.inputs, row.data());
      if (linear.transform == kNoTransform) std::copy(from, from + linear.inputs, row.data());
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * Format::kGroup;
        to.groups[m * groups + g] =
            to_bytes<Format>(row.data() + at, to.bytes.data() + m * padded + at);
      }
    }
  });
}

// A few rows times one tile: [Rows, 32].
//
// Each weight is loaded and unpacked once for all rows. A row has two accumulators, one for each
// half of the tile, which stay in registers over the whole group.
template <class V, class Format, int Rows>
void block(const uint8_t* tile, const int8_t* bytes, const Group* group, int64_t groups,
           float (*out)[kTile]) {
  const int64_t width = groups * Format::kGroup;
  typename V::F sum[Rows][2];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) sum[r][0] = sum[r][1] = V::zero();
  for (int64_t g = 0; g < groups; ++g, tile += Format::kBytes, bytes += Format::kGroup) {
    const uint8_t* weights = tile + kScales;
    typename V::I dots[Rows][2];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) dots[r][0] = dots[r][1] = V::splat(group[r * groups + g].offset);
    if constexpr (Format::kNibbles) {
#pragma GCC unroll 4
      for (int k = 0; k < Format::kGroup / 2; k += 4, weights += 128) {
        const auto left = V::load(weights), right = V::load(weights + 64);
        const auto left_low = V::low(left), right_low = V::low(right);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const auto a = V::four(bytes + r * width + k);
          dots[r][0] = V::dot(dots[r][0], left_low, a);
          dots[r][1] = V::dot(dots[r][1], right_low, a);
        }
        const auto left_high = V::high(left), right_high = V::high(right);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const auto a = V::four(bytes + r * width + Format::kGroup / 2 + k);
          dots[r][0] = V::dot(dots[r][0], left_high, a);
          dots[r][1] = V::dot(dots[r][1], right_high, a);
        }
      }
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < Format::kGroup; k += 4, weights += 128) {
        const auto left = V::load(weights), right = V::load(weights + 64);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          const auto a = V::four(bytes + r * width + k);
          dots[r][0] = V::dot(dots[r][0], left, a);
          dots[r][1] = V::dot(dots[r][1], right, a);
        }
      }
    }
    const auto left = V::bfloat16(tile), right = V::bfloat16(tile + kTile);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      sum[r][0] = V::add(sum[r][0], dots[r][0], left, group[r * groups + g].scale);
      sum[r][1] = V::add(sum[r][1], dots[r][1], right, group[r * groups + g].scale);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    V::store(out[r], sum[r][0]);
    V::store(out[r] + 16, sum[r][1]);
  }
}

template <class V, class Format, int Rows = V::kRows>
void block_of(int64_t rows, const uint8_t* tile, const int8_t* bytes, const Group* group,
              int64_t groups, float (*out)[kTile]) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return block_of<V, Format, Rows - 1>(rows, tile, bytes, group, groups, out);
  }
  block<V, Format, Rows>(tile, bytes, group, groups, out);
}

// Adds bias and residual to the sums of rows from `row` on, [count, 32], and writes them to out.
void finish(const LinearCall& linear, const float* residual, float (*sums)[kTile], int64_t row,
            int64_t count, int64_t column, float* out) {
  const int64_t n = linear.outputs, columns = std::min<int64_t>(kTile, n - column);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = (row + r) * n + column;
    if (linear.bias) {
      for (int64_t i = 0; i < columns; ++i) sums[r][i] += linear.bias[column + i];
    }
    if (residual) {
      for (int64_t i = 0; i < columns; ++i) sums[r][i] += residual[at + i];
    }
    std::copy(sums[r], sums[r] + columns, out + at);
  }
}

// Rows first..last times tiles begin..end.
template <class V, class Format>
void piece(const LinearCall& linear, const Activations& from, int64_t first, int64_t last,
           int64_t begin, int64_t end, const float* residual, float* out) {
  const int64_t groups = pieces(linear.inputs, Format::kGroup), width = groups * Format::kGroup;
  alignas(64) float sums[V::kRows][kTile];
  for (int64_t t = begin; t < end; ++t) {
    const uint8_t* tile = linear.packed + t * groups * Format::kBytes;
    for (int64_t m = first; m < last; m += V::kRows) {
      const int64_t count = std::min<int64_t>(V::kRows, last - m);
      block_of<V, Format>(count, tile, from.bytes.data() + m * width,
                          from.groups.data() + m * groups, groups, sums);
      finish(linear, residual, sums, m, count, t * kTile, out);
    }
  }
}

// The same by widened.h.
template <class V, class Format>
void widened_piece(const LinearCall& linear, const Activations& from, int64_t first, int64_t last,
                   int64_t begin, int64_t end, const float* residual, float* out) {
  const int64_t groups = pieces(linear.inputs, Format::kGroup), width = groups * Format::kGroup;
  struct alignas(64) Row {
    float sums[kTile];
  };
  thread_local std::vector<Row> sums;
  sums.resize(last - first);
  auto to = reinterpret_cast<float (*)[kTile]>(sums.data());
  for (int64_t t = begin; t < end; ++t) {
    V::template tile<Format>(linear.packed + t * groups * Format::kBytes,
                             from.widened.data() + first * width,
                             from.groups.data() + first * groups, groups, last - first, to);
    finish(linear, residual, to, first, last - first, t * kTile, out);
  }
}

template <class V>
void widen(Activations& activations, int64_t rows, int64_t width) {
  activations.widened.resize(rows * width);
  const int8_t* from = activations.bytes.data();
  int16_t* to = activations.widened.data();
  parallel_for(rows, pieces(kRoundedInputs, width), [&](int64_t begin, int64_t end) {
    V::widen_row(from + begin * width, (end - begin) * width, to + begin * width);
  });
}

template <class V, class Format>
void multiply(const LinearCall& linear, Activations& from, int64_t rows, const float* residual,
              float* out) {
  const int64_t tiles = pieces(linear.outputs, kTile);
  const int64_t width = pieces(linear.inputs, Format::kGroup) * Format::kGroup;
  const bool widened = V::kWidens && rows >= kManyRows;
  if constexpr (V::kWidens) {
    if (widened) widen<V>(from, rows, width);
  }
  // Rows are taken in parts whose activations stay in the cache while all tiles pass by.
  const int64_t cached = kCached / (widened ? 2 : 1);
  const int64_t part_rows = std::max<int64_t>(cached / width / V::kRows, 1) * V::kRows;
  const int64_t parts = pieces(rows, part_rows);
  // With few rows, as in decoding, the product waits for memory, which is fastest in long runs.
  // With more rows it waits for arithmetic, which finer pieces share out more evenly.
  const int64_t grain =
      rows <= V::kRows ? pieces(tiles, 4) : std::clamp<int64_t>(tiles / 16, 1, 16);
  const int64_t ranges = pieces(tiles, grain);
  WorkerPool::shared().run(parts * ranges, [&](int64_t number) {
    const int64_t first = number / ranges * part_rows, last = std::min(first + part_rows, rows);
    const int64_t begin = number % ranges * grain, end = std::min(begin + grain, tiles);
    if constexpr (V::kWidens) {
      if (widened) {
        return widened_piece<V, Format>(linear, from, first, last, begin, end, residual, out);
      }
    }
    piece<V, Format>(linear, from, first, last, begin, end, residual, out);
  });
}

template <class Format>
void read_row(const uint8_t* packed, int64_t inputs, int64_t row, float* out) {
  const int64_t groups = pieces(inputs, Format::kGroup), lane = row % kTile;
  const uint8_t* record = packed + row / kTile * groups * Format::kBytes;
  for (int64_t g = 0; g < groups; ++g, record += Format::kBytes) {
    const float scale = from_bits(uint32_t(record[2 * lane] | record[2 * lane + 1] << 8) << 16);
    const int64_t first = g * Format::kGroup;
    const int64_t count = std::min<int64_t>(Format::kGroup, inputs - first);
    for (int64_t k = 0; k < count; ++k) {
      const bool high = Format::kNibbles && k >= Format::kGroup / 2;
      const int64_t at = high ? k - Format::kGroup / 2 : k;
      const uint8_t stored = record[kScales + at / 4 * 4 * kTile + lane * 4 + at % 4];
      const int32_t whole =
          Format::kNibbles ? kCode[high ? stored >> 4 : stored & 15] : int32_t(stored) - kZero;
      out[first + k] = float(whole) * scale;
    }
  }
}

using Multiply = void (*)(const LinearCall&, Activations&, int64_t, const float*, float*);

// One for each instruction set, the best last.
template <class Format>
constexpr Multiply kPaths[] = {
    multiply<Portable, Format>,
#if defined(__AVX2__) && defined(__FMA__)
    multiply<Widened, Format>,
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
    multiply<Avx512, Format>,
#endif
};

constexpr int kBest = sizeof(kPaths<Int8>) / sizeof(Multiply) - 1;
std::atomic<int> path{kBest};

template <class Format>
void run(const LinearCall& linear, const float* x, int64_t rows, const float* residual,
         float* out) {
  thread_local Activations activations;
  const int64_t stride = linear.transform == kSwiglu ? 2 * linear.inputs : linear.inputs;
  for (int64_t m = 0; m < rows; m += kSlab) {
    const int64_t count = std::min(kSlab, rows - m), at = m * linear.outputs;
    prepare<Format>(linear, x + m * stride, count, activations);
    kPaths<Format>[path](linear, activations, count, residual ? residual + at : nullptr, out + at);
  }
}

}  // namespace
}  // namespace openqwen

extern "C" {

// x: [rows, inputs], with SwiGLU [rows, 2 · inputs]. out: [rows, outputs]. residual: as out, or
// null; it may be out itself.
void openqwen_linear(const openqwen::LinearCall* linear, const float* x, int64_t rows,
                     const float* residual, float* out) {
  auto run = linear->bits == 8 ? openqwen::run<openqwen::Int8> : openqwen::run<openqwen::Int4>;
  run(*linear, x, rows, residual, out);
}

// The rows `tokens` of a packed matrix as floats, [count, inputs].
void openqwen_rows(const uint8_t* packed, int64_t bits, int64_t inputs, const int64_t* tokens,
                   int64_t count, float* out) {
  auto read = bits == 8 ? openqwen::read_row<openqwen::Int8> : openqwen::read_row<openqwen::Int4>;
  openqwen::parallel_for(count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) read(packed, inputs, tokens[m], out + m * inputs);
  });
}

// Chooses an instruction set: 0 portable, 1 AVX2, 2 AVX512-VNNI; one that was not built becomes the
// best one below it. Returns the one in use. For tests.
int32_t openqwen_set_path(int32_t wanted) {
  openqwen::path = std::clamp(wanted, 0, openqwen::kBest);
  return openqwen::path;
}
}
