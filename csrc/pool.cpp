#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#endif

#include "thrifty.h"

namespace thrifty {
namespace {

using Clock = std::chrono::steady_clock;

// Long enough to bridge the Python code between two products of a decode step, short enough to leave the cores to
// another library's threads.
constexpr std::chrono::microseconds kSpin{50};

/// A thread's run of parts that are still to be claimed, first ... end - 1, in one word with the job they belong to. A
/// claim is one exchange, which fails when the job has gone; a claimed part keeps its job from ending.
struct Run {
  uint32_t job;
  uint32_t first;
  uint32_t end;

  static Run of(uint64_t word) {
    return {uint32_t(word >> 32), uint32_t(word >> 16) & 0xFFFF, uint32_t(word) & 0xFFFF};
  }
  uint64_t word() const { return uint64_t{job} << 32 | first << 16 | end; }
};
static_assert(kMostThreads * kMostPartsPerThread <= 0xFFFF, "part numbers fit a run");

struct alignas(64) SharedRun {
  std::atomic<uint64_t> word{0};
};

class Pool {
 public:
  /// False where another caller has the pool.
  bool run(int threads, int parts_per_thread, Part part, const void* context) {
    if (busy_.test_and_set(std::memory_order_acquire)) return false;
    grow(threads - 1);
    part_ = part;
    context_ = context;
    parts_ = threads * parts_per_thread;
    unfinished_.store(parts_, std::memory_order_relaxed);
    const uint32_t job = uint32_t(ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    for (int i = 0; i < threads; ++i) {
      const Run dealt{job, uint32_t(i * parts_per_thread), uint32_t((i + 1) * parts_per_thread)};
      runs_[i].word.store(dealt.word(), std::memory_order_relaxed);
    }
    publish(uint64_t{job} << 32 | uint32_t(threads));
    take_part(job, 0, threads);
    wait_for_others();
    busy_.clear(std::memory_order_release);
    return true;
  }

 private:
  /// As many workers as there can be: what a missing one was dealt, the others take.
  void grow(int workers) {
    while (workers_ < workers) {
      try {
        const uint64_t seen = ticket_.load(std::memory_order_relaxed);
        std::thread([this, index = workers_ + 1, seen] { work(index, seen); }).detach();
      } catch (...) {  // the system's error, or no memory for the thread's state
        return;
      }
      ++workers_;
    }
  }

  void publish(uint64_t ticket) {
    ticket_.store(ticket, std::memory_order_seq_cst);
    if (parked_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
  }

  /// Runs the parts dealt to thread `index`, then those that others have not come to.
  void take_part(uint32_t job, int index, int threads) {
    for (int i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& shared = runs_[(index + i) % threads].word;
      uint64_t word = shared.load(std::memory_order_acquire);
      for (;;) {
        Run run = Run::of(word);
        if (run.job != job || run.first == run.end) break;
        const uint32_t part = i == 0 ? run.first++ : --run.end;
        if (!shared.compare_exchange_weak(word, run.word(), std::memory_order_acq_rel, std::memory_order_acquire)) {
          continue;
        }
        part_(context_, int(part), parts_);
        unfinished_.fetch_sub(1, std::memory_order_release);
        word = shared.load(std::memory_order_acquire);
      }
    }
  }

  void wait_for_others() {
    const auto deadline = Clock::now() + kSpin;
    while (unfinished_.load(std::memory_order_acquire) > 0) {
      relax();
      // A worker that lost its core to another process is not helped by spinning on this one.
      if (Clock::now() > deadline) std::this_thread::yield();
    }
  }

  void work(int index, uint64_t ticket) {
    for (;;) {
      ticket = wait_for_job(ticket);
      const int threads = int(ticket & 0xFFFFFFFF);
      if (index < threads) take_part(uint32_t(ticket >> 32), index, threads);
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
  int parts_ = 0;
  SharedRun runs_[kMostThreads];
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};  // number of the job, and how many threads may take part
  std::atomic<int> parked_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

// Never destroyed: its threads wait on it until the process ends.
std::atomic<Pool*> the_pool{nullptr};

/// A job on the threads of an OpenMP runtime. Parts are dealt and claimed as the pool's are.
struct Team {
  using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

  Part part;
  const void* context;
  int threads;
  int parts_per_thread;
  std::atomic<int> members{0};
  std::atomic<int> claimed[kMostThreads];

  Team(int most, int each, Part body, const void* data)
      : part(body), context(data), threads(most), parts_per_thread(each) {
    for (int i = 0; i < threads; ++i) claimed[i].store(0, std::memory_order_relaxed);
  }

  /// The team is as large as the runtime likes: were it another size each time, threads would end and start anew.
  void run(Parallel parallel) {
    parallel([](void* team) { static_cast<Team*>(team)->take_parts(); }, this, 0, 0);
  }

  void take_parts() {
    const int index = members.fetch_add(1, std::memory_order_relaxed);
    if (index >= threads) return;
    for (int i = 0; i < threads; ++i) {
      const int from = (index + i) % threads;
      for (int n; (n = claimed[from].fetch_add(1, std::memory_order_relaxed)) < parts_per_thread;) {
        part(context, from * parts_per_thread + n, threads * parts_per_thread);
      }
    }
  }
};

std::atomic<Team::Parallel> the_openmp{nullptr};

#if !defined(_WIN32)
// A child of fork has none of the threads, so it drops the pool, locks and all, and makes another. Registered as the
// library loads, before there can be a pool that a fork would copy.
[[maybe_unused]] const int kAtFork = pthread_atfork(nullptr, nullptr, [] {
  the_pool.store(nullptr, std::memory_order_release);
  the_openmp.store(nullptr, std::memory_order_release);
});
#endif

Pool* get_pool() {
  Pool* pool = the_pool.load(std::memory_order_acquire);
  if (pool != nullptr) return pool;
  Pool* made = new (std::nothrow) Pool;
  if (made == nullptr) return nullptr;
  if (!the_pool.compare_exchange_strong(pool, made, std::memory_order_acq_rel)) {
    delete made;
    return pool;
  }
  return made;
}

}  // namespace

void relax() {
#if defined(_MSC_VER)
  YieldProcessor();
#elif defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void run_parts(int threads, int parts_per_thread, Part part, const void* context) {
  if (const auto openmp = the_openmp.load(std::memory_order_acquire)) {
    Team(threads, parts_per_thread, part, context).run(openmp);
    return;
  }
  Pool* pool = get_pool();
  if (pool != nullptr && pool->run(threads, parts_per_thread, part, context)) return;
  const int parts = threads * parts_per_thread;
  for (int i = 0; i < parts; ++i) part(context, i, parts);
}

}  // namespace thrifty

void thrifty_use_openmp(void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags)) {
  thrifty::the_openmp.store(parallel, std::memory_order_release);
}
