// All layers of a packed network in one call, so that no Python runs between the matrices.
//
// The steps and their kernels are those of QuantizedLayer in quantize.py, so the bits are the same.

#include "layers.h"

#include <algorithm>
#include <vector>

namespace openqwen {
namespace {

// Rows that pass through a feed-forward network at once, so that what lies between its two matrices
// stays in the processor's cache. quantize.py has the same number.
constexpr int64_t kFeedForwardRows = 256;

}  // namespace
}  // namespace openqwen

// x: [rows, D], the embedded tokens; overwritten by the last layer's output. `call` has as many
// rows.
extern "C" void openqwen_layers(const openqwen::PagedCall* call, const openqwen::LayerCall* layers,
                                int64_t count, float* x) {
  using namespace openqwen;
  const int64_t rows = call->rows;
  const int64_t q_width = call->heads * call->width, kv_width = call->kv_heads * call->width;
  const int64_t qkv_width = q_width + 2 * kv_width;
  thread_local std::vector<float> qkv, attended, inner;
  qkv.resize(rows * qkv_width);
  attended.resize(rows * q_width);
  for (int64_t n = 0; n < count; ++n) {
    const LayerCall& layer = layers[n];
    openqwen_linear(layer.qkv, x, rows, nullptr, qkv.data());
    const float *q = qkv.data(), *k = q + q_width, *v = k + kv_width;
    openqwen_paged_attention(call, n, q, qkv_width, k, qkv_width, v, qkv_width, attended.data());
    openqwen_linear(layer.o, attended.data(), rows, x, x);
    inner.resize(std::min(rows, kFeedForwardRows) * layer.gate_up->outputs);
    for (int64_t first = 0; first < rows; first += kFeedForwardRows) {
      float* part = x + first * layer.o->outputs;
      const int64_t part_rows = std::min(kFeedForwardRows, rows - first);
      openqwen_linear(layer.gate_up, part, part_rows, nullptr, inner.data());
      openqwen_linear(layer.down, inner.data(), part_rows, part, part);
    }
  }
}
