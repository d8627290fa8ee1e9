// y = W f(x) + b (+ residual), W quantised; f: nothing, RMSNorm, or SwiGLU. C ABI, called by kernels.py.
//
// Activations become signed bytes on the way in, a scale for each group of each row. Bytes are multiplied and added
// exactly within a group; groups add up in float32 in their order. An output is therefore a function of its own row and
// of the weights alone: the same bits in any batch, on any number of threads, by any of the three instruction sets.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "lanes.h"
#include "layers.h"
#include "packed.h"
#include "pool.h"
#include "simd.h"

namespace openqwen {
namespace {

constexpr int64_t kSlab = 512;                  // rows whose activations are held as bytes at one time
constexpr int64_t kCached = 384 * 1024;         // bytes of activations that stay near a core while tiles pass by
constexpr int64_t kTransform = 32 * 1024;       // inputs that one thread turns into bytes at a time, at least

// A group of a row: its scale, and −zero · Σ q, where every sum of products begins.
struct Group {
  float scale;
  int32_t offset;
};

// `count` numbers, or sixteen if there are more; zeros where there are fewer.
Lanes load_up_to(const float* x, int64_t count) {
  if (count >= kLanes) return load(x);
  float some[kLanes] = {};
  std::copy(x, x + count, some);
  return load(some);
}

// Both write whole sixteens to `out`: beyond the width, zeros.
void rms_norm(const float* x, const Linear& linear, float* out) {
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

// out: the group's bytes.
template <class Format>
Group to_bytes(const float* x, int8_t* out) {
  Lanes most = all(0), nothing = all(0);
  for (int k = 0; k < Format::kGroup; k += kLanes) {
    const Lanes v = load(x + k);
    most = larger(magnitude(v), most);
    nothing = nothing + v * all(0);  // not a number, where one of them is none or infinite
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

// The bytes of a slab of rows, [rows, groups · kGroup], and their groups, [rows, groups].
struct Activations {
  std::vector<int8_t> bytes;
  std::vector<Group> groups;
};

template <class Format>
void prepare(const Linear& linear, const float* x, int64_t rows, Activations& to) {
  const int64_t groups = pieces(linear.inputs, Format::kGroup), padded = groups * Format::kGroup;
  const int64_t stride = linear.before == kSwiglu ? 2 * linear.inputs : linear.inputs;
  to.bytes.resize(rows * padded);
  to.groups.resize(rows * groups);
  parallel_for(rows, pieces(kTransform, padded), [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> row;
    row.assign(padded, 0.0f);
    for (int64_t m = begin; m < end; ++m) {
      const float* from = x + m * stride;
      if (linear.before == kNorm) rms_norm(from, linear, row.data());
      if (linear.before == kSwiglu) swiglu(from, linear.inputs, row.data());
      if (linear.before == kNothing) std::copy(from, from + linear.inputs, row.data());
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = g * Format::kGroup;
        to.groups[m * groups + g] = to_bytes<Format>(row.data() + at, to.bytes.data() + m * padded + at);
      }
    }
  });
}

// A few rows times one tile: [Rows, 32].
template <class V, class Format, int Rows>
void block(const uint8_t* tile, const int8_t* bytes, const Group* group, int64_t groups, float (*out)[kTile]) {
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
void block_of(int64_t rows, const uint8_t* tile, const int8_t* bytes, const Group* group, int64_t groups,
              float (*out)[kTile]) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return block_of<V, Format, Rows - 1>(rows, tile, bytes, group, groups, out);
  }
  block<V, Format, Rows>(tile, bytes, group, groups, out);
}

template <class V, class Format>
void multiply(const Linear& linear, const Activations& from, int64_t rows, const float* residual, float* out) {
  const int64_t groups = pieces(linear.inputs, Format::kGroup), tiles = pieces(linear.outputs, kTile);
  const int64_t width = groups * Format::kGroup, n = linear.outputs;
  const int64_t near = std::max<int64_t>(kCached / width / V::kRows, 1) * V::kRows, parts = pieces(rows, near);
  // One block of rows waits for memory, which likes long runs; more rows are worth sharing out finely.
  const int64_t grain = rows <= V::kRows ? pieces(tiles, 4) : std::clamp<int64_t>(tiles / 16, 1, 16);
  const int64_t ranges = pieces(tiles, grain);
  Pool::shared().run(parts * ranges, [&](int64_t piece) {
    const int64_t first = piece / ranges * near, last = std::min(first + near, rows);
    const int64_t begin = piece % ranges * grain, end = std::min(begin + grain, tiles);
    alignas(64) float found[V::kRows][kTile];
    for (int64_t t = begin; t < end; ++t) {
      const uint8_t* tile = linear.packed + t * groups * Format::kBytes;
      const int64_t column = t * kTile, columns = std::min<int64_t>(kTile, n - column);
      for (int64_t m = first; m < last; m += V::kRows) {
        const int64_t count = std::min<int64_t>(V::kRows, last - m);
        block_of<V, Format>(count, tile, from.bytes.data() + m * width, from.groups.data() + m * groups, groups, found);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t at = (m + r) * n + column;
          if (linear.bias) {
            for (int64_t i = 0; i < columns; ++i) found[r][i] += linear.bias[column + i];
          }
          if (residual) {
            for (int64_t i = 0; i < columns; ++i) found[r][i] += residual[at + i];
          }
          std::copy(found[r], found[r] + columns, out + at);
        }
      }
    }
  });
}

template <class Format>
void read_row(const uint8_t* packed, int64_t inputs, int64_t row, float* out) {
  const int64_t groups = pieces(inputs, Format::kGroup), lane = row % kTile;
  const uint8_t* record = packed + row / kTile * groups * Format::kBytes;
  for (int64_t g = 0; g < groups; ++g, record += Format::kBytes) {
    const float scale = from_bits(uint32_t(record[2 * lane] | record[2 * lane + 1] << 8) << 16);
    const int64_t first = g * Format::kGroup, count = std::min<int64_t>(Format::kGroup, inputs - first);
    for (int64_t k = 0; k < count; ++k) {
      const bool high = Format::kNibbles && k >= Format::kGroup / 2;
      const int64_t at = high ? k - Format::kGroup / 2 : k;
      const uint8_t stored = record[kScales + at / 4 * 4 * kTile + lane * 4 + at % 4];
      const int32_t whole = Format::kNibbles ? kCode[high ? stored >> 4 : stored & 15] : int32_t(stored) - kZero;
      out[first + k] = float(whole) * scale;
    }
  }
}

using Multiply = void (*)(const Linear&, const Activations&, int64_t, const float*, float*);

// By instruction set, the best last.
template <class Format>
constexpr Multiply kPaths[] = {
    multiply<Portable, Format>,
#if defined(__AVX2__) && defined(__FMA__)
    multiply<Avx2, Format>,
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
    multiply<Avx512, Format>,
#endif
};

constexpr int kBest = sizeof(kPaths<Int8>) / sizeof(Multiply) - 1;
std::atomic<int> path{kBest};

template <class Format>
void run(const Linear& linear, const float* x, int64_t rows, const float* residual, float* out) {
  thread_local Activations activations;
  const int64_t stride = linear.before == kSwiglu ? 2 * linear.inputs : linear.inputs;
  for (int64_t m = 0; m < rows; m += kSlab) {
    const int64_t count = std::min(kSlab, rows - m), at = m * linear.outputs;
    prepare<Format>(linear, x + m * stride, count, activations);
    kPaths<Format>[path](linear, activations, count, residual ? residual + at : nullptr, out + at);
  }
}

}  // namespace
}  // namespace openqwen

extern "C" {

// x [rows, inputs] ([rows, 2 · inputs] before SwiGLU) → out [rows, outputs]; residual: as out, or null, and may be out.
void openqwen_linear(const openqwen::Linear* linear, const float* x, int64_t rows, const float* residual, float* out) {
  auto run = linear->bits == 8 ? openqwen::run<openqwen::Int8> : openqwen::run<openqwen::Int4>;
  run(*linear, x, rows, residual, out);
}

// The rows `tokens` of a packed matrix in floats: out [count, inputs].
void openqwen_rows(const uint8_t* packed, int64_t bits, int64_t inputs, const int64_t* tokens, int64_t count,
                   float* out) {
  auto read = bits == 8 ? openqwen::read_row<openqwen::Int8> : openqwen::read_row<openqwen::Int4>;
  openqwen::parallel_for(count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) read(packed, inputs, tokens[m], out + m * inputs);
  });
}

// 0 portable, 1 AVX2, 2 AVX512-VNNI; one that was not built becomes the best below it. Returns the one in use.
int32_t openqwen_set_path(int32_t wanted) {
  openqwen::path = std::clamp(wanted, 0, openqwen::kBest);
  return openqwen::path;
}
}
