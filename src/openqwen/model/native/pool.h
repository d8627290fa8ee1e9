// A few threads that wait for work, shared by all kernels of this library.
//
// parallel_for cuts a range into pieces that depend on the range and the grain alone, never on the number of threads;
// who takes which piece is left to chance, so a body whose pieces are independent gives the same bits on any machine.
// Between calls the threads look for work for a moment, then sleep. A call that comes from another thread while the
// pool is taken, or from inside a body, runs alone. After fork() the child starts threads of its own.

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

class Pool {
 public:
  static Pool& shared() { return *slot().load(std::memory_order_acquire); }

  int threads() const { return width_.load(std::memory_order_relaxed); }

  // How many threads work, the caller among them.
  void set_threads(int count) {
    std::lock_guard<std::mutex> lock(mutex_);
    width_.store(std::max(count, 1), std::memory_order_relaxed);
    rest_.notify_all();
  }

  // Calls body(i) for each i of 0 … count − 1, on any thread and in any order; returns when all are done.
  template <class Body>
  void run(int64_t count, const Body& body) {
    bool taken = false;
    if (count < 2 || threads() < 2 || !taken_.compare_exchange_strong(taken, true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) body(i);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < threads() - 1; ++started_) {
        std::thread([this, index = started_] { serve(index); }).detach();
      }
      call_ = [](const void* what, int64_t i) { (*static_cast<const Body*>(what))(i); };
      body_ = &body;
      count_ = count;
      next_ = 0;
      left_.store(count, std::memory_order_relaxed);
      round_.fetch_add(1, std::memory_order_release);
      if (asleep_ > 0) wake_.notify_all();
    }
    work();
    for (int spins = 0; left_.load(std::memory_order_acquire) != 0; ++spins) {
      relax();
      if (spins > 20'000) std::this_thread::yield();  // somebody else has the other core
    }
    taken_.store(false, std::memory_order_release);
  }

 private:
  static constexpr std::chrono::microseconds kAwake{150};  // longer than what Python does between two calls

  static std::atomic<Pool*>& slot() {
    static std::atomic<Pool*> one{[] {
      // The child of fork() has none of the threads; what the parent's held is left to it, as it was.
      pthread_atfork(nullptr, nullptr, [] { slot().store(new Pool(shared().threads())); });
      return new Pool(1);
    }()};
    return one;
  }

  explicit Pool(int width) : width_(width) {}

  void work() {
    for (;;) {
      void (*call)(const void*, int64_t);
      const void* body;
      int64_t i;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (next_ == count_) return;
        i = next_++;
        call = call_;
        body = body_;
      }
      call(body, i);
      left_.fetch_sub(1, std::memory_order_acq_rel);
    }
  }

  void serve(int index) {
    uint64_t seen = 0;
    for (;;) {
      if (!comes_soon(seen)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != seen; });
        --asleep_;
      }
      seen = round_.load(std::memory_order_acquire);
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
        if (round_.load(std::memory_order_acquire) != seen) return true;
        relax();
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  std::mutex mutex_;  // over what follows, but for the atomics
  std::condition_variable wake_, rest_;
  int started_ = 0, asleep_ = 0;
  void (*call_)(const void*, int64_t) = nullptr;
  const void* body_ = nullptr;
  int64_t count_ = 0, next_ = 0;

  std::atomic<int> width_;
  std::atomic<bool> taken_{false};
  std::atomic<uint64_t> round_{0};
  std::atomic<int64_t> left_{0};
};

// body(begin, end) for each run of `grain` of 0 … count − 1, the last one shorter.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  Pool::shared().run((count + grain - 1) / grain, [&](int64_t i) {
    body(i * grain, std::min((i + 1) * grain, count));
  });
}

}  // namespace openqwen
