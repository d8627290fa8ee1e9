// The C ABI of the thread pool.

#include "pool.h"

extern "C" {

void openqwen_set_threads(int32_t count) { openqwen::WorkerPool::shared().set_threads(count); }

// out[i] = i², for the tests of the pool.
void openqwen_pool_squares(int64_t* out, int64_t count, int64_t grain) {
  openqwen::parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = i * i;
  });
}
}
