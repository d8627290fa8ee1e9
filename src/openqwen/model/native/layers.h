// The structures that Python fills for the kernels of a layer, and the kernels' declarations.
//
// model/structs.py has the same structures, field by field; tests/model/test_structs.py compares
// names, offsets, sizes and types. Every field is a number or an address of 8 bytes.
#pragma once

#include <cstdint>

namespace openqwen {

// What happens to the input on its way into a matrix.
enum Transform : int64_t { kNoTransform = 0, kRmsNorm = 1, kSwiglu = 2 };

// y = W transform(x) + bias.
struct LinearCall {
  const uint8_t* packed;  // W, see packed.h
  const float* bias;      // [outputs], or null
  const float* norm;      // [inputs], the weight of kRmsNorm, else null
  int64_t inputs, outputs;
  int64_t bits;       // of a weight, 8 or 4
  int64_t transform;  // a Transform
  double eps;         // of kRmsNorm
};

// The matrices of one layer, in the order in which a token passes them.
struct LayerCall {
  const LinearCall* qkv;
  const LinearCall* o;
  const LinearCall* gate_up;
  const LinearCall* down;
};

// Rotations of a query in Dual Chunk Attention: for the keys of its own chunk, of the chunk before,
// and of all earlier chunks. Without chunks only the first is used.
constexpr int kRotations = 3;

// What all layers of one forward call have in common.
struct PagedCall {
  int64_t heads, kv_heads, width;  // H, K, d
  int64_t slots, pages;            // S slots of a page; pages of the cache
  int64_t sequences, rows;         // rows: new tokens of all sequences
  int64_t table_width;             // pages of a row of `tables`
  const int64_t* tables;           // [sequences, table_width] page numbers
  const int64_t* totals;           // [sequences] tokens, the new ones included
  const int64_t* counts;           // [sequences] new tokens
  const int64_t* chunk_lens;       // [sequences] multiples of 16, 0: not divided; or null
  const float* key_cos;            // [rows, d/2]
  const float* key_sin;
  const float* query_cos[kRotations];  // [rows, d/2] each; null where no sequence is divided
  const float* query_sin[kRotations];
  void* keys;                      // [layers, pages, K, d, S] float32 or int8
  void* values;                    // [layers, pages, K, S, d]
  float* key_scales;               // [layers, pages, K, S] of int8, else null
  float* value_scales;             // as key_scales
  const float* key_bias;           // [layers, K, d], see `read_keys` in attention.cpp; or null
  const float* const* bias_bases;  // [sequences] → [positions / 16, 2, d/2] cos and sin
  const float* const* bias_steps;  // [sequences] → [2, d/2, 16] cos and sin
};

}  // namespace openqwen

extern "C" {
void openqwen_linear(const openqwen::LinearCall* linear, const float* x, int64_t rows,
                     const float* residual, float* out);
void openqwen_paged_attention(const openqwen::PagedCall* call, int64_t layer, const float* q,
                              int64_t q_stride, const float* k, int64_t k_stride, const float* v,
                              int64_t v_stride, float* out);
}
