// What Python tells the kernels of a layer, and their names for each other: kernels.py, quantize.py and paged.py lay
// these structures out. Numbers and addresses of 8 bytes.
#pragma once

#include <cstdint>

namespace openqwen {

enum Before : int64_t { kNothing = 0, kNorm = 1, kSwiglu = 2 };

// y = W before(x) + bias.
struct Linear {
  const uint8_t* packed;
  const float* bias;         // [outputs], or null
  const float* norm;         // [inputs], where before is kNorm
  int64_t inputs, outputs, bits, before;
  double eps;
};

constexpr int kTurns = 3;  // of a query: for its own chunk, the one before, all earlier ones

// What stays the same in all layers of one forward call. Python fills it (paged.py has the same list).
struct PagedCall {
  int64_t heads, kv_heads, width, slots, pages, sequences, rows, table_width;
  const int64_t* tables;      // [sequences, table_width]
  const int64_t* totals;      // [sequences] tokens, the new ones included
  const int64_t* counts;      // [sequences] new tokens
  const int64_t* chunk_lens;  // [sequences] multiples of 16, or 0 where a sequence is not divided
  const float* key_turn[2];   // cos and sin, [rows, d/2]
  const float* query_turns[kTurns][2];
  void* keys;                 // [layers, pages, K, d, S] float32 or int8
  void* values;               // [layers, pages, K, S, d]
  float* key_scales;          // [layers, pages, K, S] where int8, else null
  float* value_scales;
  const float* key_bias;      // [layers, K, d]: taken off before rounding, added after; null where there is none
  const float* const* bias_bases;  // [sequences] → [positions / 16, 2, d/2] cos and sin of every sixteenth position
  const float* const* bias_steps;  // [sequences] → [2, d/2, 16] cos and sin of positions 0 … 15
};

struct Layer {
  const Linear *qkv, *o, *gate_up, *down;
};

}  // namespace openqwen

extern "C" {
void openqwen_linear(const openqwen::Linear* linear, const float* x, int64_t rows, const float* residual, float* out);
void openqwen_paged_attention(const openqwen::PagedCall* call, int64_t layer, const float* q, int64_t q_stride,
                              const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* out);
}
