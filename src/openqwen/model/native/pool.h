// A pool of threads that all kernels of this library share.
//
// parallel_for cuts a range into pieces that depend on the range and the grain alone, never on the
// number of threads. Any thread may take any piece, so a body whose pieces are independent gives
// the same bits on every machine. Between calls the threads spin for a moment, then sleep. A call
// from another thread while the pool is busy, and a call from inside a body, run on their own
// thread only. After fork() the child starts its own threads.

#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace openqwen {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class WorkerPool {
 public:
  static WorkerPool& shared() { return *slot().load(std::memory_order_acquire); }

  int threads() const { return width_.load(std::memory_order_relaxed); }

  // How many threads work, the caller among them.
  void set_threads(int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    width_.store(std::max(count, 1), std::memory_order_relaxed);
    rest_.notify_all();
  }

  // Calls body(i) for each i of 0 … count − 1, on any thread and in any order. Returns when all are
  // done.
  template <class Body>
  void run(int64_t count, const Body& body) {
    bool taken = false;
    if (count < 2 || threads() < 2 ||
        !taken_.compare_exchange_strong(taken, true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    const uint64_t round = ((next_.load(std::memory_order_relaxed) >> 32) + 1) << 32;
    next_.store(round | kClosed, std::memory_order_seq_cst);
    call_.store([](const void* what, int64_t i) { (*static_cast<const Body*>(what))(i); },
                std::memory_order_release);
    body_.store(&body, std::memory_order_release);
    count_.store(count, std::memory_order_release);
    left_.store(count, std::memory_order_relaxed);
    next_.store(round, std::memory_order_seq_cst);
    if (started_ < threads() - 1 || asleep_.load(std::memory_order_seq_cst) > 0) summon();
    work();
    for (int spins = 0; left_.load(std::memory_order_acquire) != 0; ++spins) {
      relax();
      if (spins > 20'000) std::this_thread::yield();  // another process has the core
    }
    taken_.store(false, std::memory_order_release);
  }

 private:
  // How long threads spin before they sleep: longer than Python takes between two calls.
  static constexpr std::chrono::microseconds kAwake{150};

  static std::atomic<WorkerPool*>& slot() {
    static std::atomic<WorkerPool*> one{[] {
      // The child of fork() has none of the parent's threads. The parent's pool may be locked by
      // one of them, so the child leaves it alone and makes a new one.
      pthread_atfork(nullptr, nullptr, [] { slot().store(new WorkerPool(shared().threads())); });
      return new WorkerPool(1);
    }()};
    return one;
  }

  explicit WorkerPool(int width) : width_(width) {}

  // Takes pieces of the current call until none is left.
  //
  // No lock: `run` closes `next_` (kClosed) before it changes call, body and count, and opens it
  // with a new round number after. A piece is taken only if `next_` still has the value that it had
  // before the three were read, so they always belong to the same call, that of the piece.
  void work() {
    uint64_t at = next_.load(std::memory_order_acquire);
    for (;;) {
      const auto call = call_.load(std::memory_order_acquire);
      const void* body = body_.load(std::memory_order_acquire);
      const int64_t count = count_.load(std::memory_order_acquire), i = at & kClosed;
      if (i == kClosed) {
        relax();
        at = next_.load(std::memory_order_acquire);
      } else if (i >= count) {
        return;
      } else if (next_.compare_exchange_weak(at, at + 1, std::memory_order_acq_rel,
                                             std::memory_order_acquire)) {
        call(body, i);
        left_.fetch_sub(1, std::memory_order_acq_rel);
        at = next_.load(std::memory_order_acquire);
      }
    }
  }

  // Start the threads that are missing and wake those that sleep.
  void summon() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (; started_ < threads() - 1; ++started_) {
      std::thread([this, index = started_] { serve(index); }).detach();
    }
    wake_.notify_all();
  }

  uint64_t round() const { return next_.load(std::memory_order_seq_cst) >> 32; }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      if (!comes_soon(seen)) {
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return round() != seen; });
        asleep_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = round();
      if (index < threads() - 1) {
        work();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        rest_.wait(lock, [&] { return index < threads() - 1; });
      }
    }
  }

  bool comes_soon(uint64_t seen) const {
    const auto end = std::chrono::steady_clock::now() + kAwake;
    do {
      for (int i = 0; i < 32; ++i) {
        if (round() != seen) return true;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  static constexpr uint64_t kClosed = 0xffffffff;

  std::mutex mutex_;
  std::condition_variable wake_, rest_;
  int started_ = 0;  // threads; whoever has `taken_` starts more

  // The current call: its round number (upper half) and its next piece (lower half), or kClosed
  // while the three fields below change.
  alignas(64) std::atomic<uint64_t> next_{0};
  std::atomic<void (*)(const void*, int64_t)> call_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int64_t> count_{0};

  alignas(64) std::atomic<int64_t> left_{0};
  std::atomic<int> width_, asleep_{0};
  std::atomic<bool> taken_{false};
};

// Calls body(begin, end) for consecutive ranges of `grain` numbers of 0 … count − 1; the last may
// be shorter.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  WorkerPool::shared().run((count + grain - 1) / grain,
                     [&](int64_t i) { body(i * grain, std::min((i + 1) * grain, count)); });
}

}  // namespace openqwen
