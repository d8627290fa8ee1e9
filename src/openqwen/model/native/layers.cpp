// All layers of a packed network in one call: what lies between their matrices and attention never meets Python.
// The steps are quantize.py's QuantizedLayer's own, with the same kernels, so the bits are the same. C ABI.

#include "layers.h"

#include <algorithm>
#include <vector>

namespace openqwen {
namespace {

constexpr int64_t kSome = 256;  // rows that pass through a feed-forward network at once, so that they stay in the cache

}  // namespace
}  // namespace openqwen

// x: [rows, D], the embedded tokens, in place; `call` has as many rows.
extern "C" void openqwen_layers(const openqwen::PagedCall* call, const openqwen::Layer* layers, int64_t count, float* x) {
  using namespace openqwen;
  const int64_t rows = call->rows, q = call->heads * call->width, kv = call->kv_heads * call->width, all = q + 2 * kv;
  thread_local std::vector<float> heads, attended, inner;
  heads.resize(rows * all);
  attended.resize(rows * q);
  for (int64_t n = 0; n < count; ++n) {
    const Layer& layer = layers[n];
    openqwen_linear(layer.qkv, x, rows, nullptr, heads.data());
    openqwen_paged_attention(call, n, heads.data(), all, heads.data() + q, all, heads.data() + q + kv, all,
                             attended.data());
    openqwen_linear(layer.o, attended.data(), rows, x, x);
    inner.resize(std::min(rows, kSome) * layer.gate_up->outputs);
    for (int64_t m = 0; m < rows; m += kSome) {
      float* some = x + m * layer.o->outputs;
      const int64_t these = std::min(kSome, rows - m);
      openqwen_linear(layer.gate_up, some, these, nullptr, inner.data());
      openqwen_linear(layer.down, inner.data(), these, some, some);
    }
  }
}
