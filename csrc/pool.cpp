#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the Python code between two products of a decode step, short enough to leave the cores to
// another library's threads.
constexpr std::chrono::microseconds kSpin{50};
constexpr int kMostThreads = 1024;

void relax() {
#if defined(_MSC_VER)
  YieldProcessor();
#elif defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

class Pool {
 public:
  bool run(int parts, Part part, const void* context) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    const bool enough = grow(parts - 1);
    if (enough) {
      part_ = part;
      context_ = context;
      pending_.store(parts - 1, std::memory_order_relaxed);
      publish(parts);
      part(context, 0, parts);
      wait_for_workers();
    }
    busy_.clear(std::memory_order_release);
    return enough;
  }

 private:
  bool grow(int workers) {
    while (workers_ < workers) {
      try {
        const uint64_t seen = ticket_.load(std::memory_order_relaxed);
        std::thread([this, index = workers_ + 1, seen] { work(index, seen); }).detach();
      } catch (const std::system_error&) {
        return false;
      }
      ++workers_;
    }
    return true;
  }

  // One word says both that a job is new and how many take part, so that a worker without a part never looks at the
  // job, which may be gone.
  void publish(int parts) {
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 16) + 1;
    ticket_.store(job << 16 | uint64_t(parts), std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
  }

  void wait_for_workers() {
    const auto deadline = Clock::now() + kSpin;
    while (pending_.load(std::memory_order_acquire) > 0) {
      relax();
      // A worker that lost its core to another process is not helped by spinning on this one.
      if (Clock::now() > deadline) std::this_thread::yield();
    }
  }

  void work(int index, uint64_t seen) {
    for (;;) {
      seen = wait_for_job(seen);
      const int parts = int(seen & 0xFFFF);
      if (index >= parts) continue;
      part_(context_, index, parts);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  uint64_t wait_for_job(uint64_t seen) {
    const auto deadline = Clock::now() + kSpin;
    do {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (ticket != seen) return ticket;
      relax();
    } while (Clock::now() < deadline);
    std::unique_lock<std::mutex> lock(mutex_);
    parked_.fetch_add(1, std::memory_order_seq_cst);
    uint64_t ticket;
    while ((ticket = ticket_.load(std::memory_order_seq_cst)) == seen) wake_.wait(lock);
    parked_.fetch_sub(1, std::memory_order_seq_cst);
    return ticket;
  }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  int workers_ = 0;
  Part part_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<int> pending_{0};
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads wait on it until the process ends. A child of fork has none of the threads, so it drops
// the pool, locks and all, and makes another.
std::atomic<Pool*> the_pool{nullptr};

Pool* get_pool() {
  Pool* pool = the_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return pool;
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr) return nullptr;
  if (!the_pool.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) {
    delete made;
    return pool;
  }
#if !defined(_WIN32)
  static std::atomic_flag registered = ATOMIC_FLAG_INIT;
  if (!registered.test_and_set()) {
    pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_release); });
  }
#endif
  return made;
}

}  // namespace

void run_parts(int parts, Part part, const void* context) {
  if (parts > kMostThreads) parts = kMostThreads;
  if (parts > 1) {
    Pool* pool = get_pool();
    if (pool != nullptr && pool->run(parts, part, context)) return;
  }
  for (int i = 0; i < parts; ++i) part(context, i, parts);
}

}  // namespace thrifty
