// Runs the cases of tests/native_cases.py on every instruction set of this processor, on 1, 2, 3 and 7 threads; with a
// second argument `shared`, also from two callers at once and in a forked child. Exits with 1 at the first difference
// from the spec.
//
// An array ends where a page begins that nothing may touch: one byte past it is fatal also where no sanitizer looks, in
// masked loads and in tiles.

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "thrifty.h"

// Absent in a build without sanitizers.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t bytes);
// What a sanitizer finds aborts, and the handler of that names the case. The child of a fork starts threads.
const char* __asan_default_options() { return "abort_on_error=1"; }
const char* __ubsan_default_options() { return "abort_on_error=1:print_stacktrace=1"; }
const char* __tsan_default_options() { return "abort_on_error=1:halt_on_error=1:die_after_fork=0"; }
}

namespace {

/// What is known of an array after a run: it is as before; it has these bytes; its floats lie within the tolerance, and
/// have the same bits on any thread count; nothing; nothing, and it is a cache whose size the library tells.
enum Check : int64_t { kGiven, kExact, kClose, kAny, kCache };

struct Array {
  Check check;
  double tolerance;
  std::vector<char> start, expected;
  size_t bytes;
};

/// Numbers of a call are its arguments in order, arrays as indices, -1 for NULL; the thread count is the driver's.
struct Call {
  int64_t function, result;
  std::vector<int64_t> n;
  std::vector<double> f;
};

struct Case {
  std::string name;
  std::vector<Array> arrays;
  std::vector<Call> calls;
};

/// Bits of the arrays within a tolerance, from the first thread count of an instruction set.
using Bits = std::vector<std::vector<char>>;

std::atomic<const char*> current{"no case"};
std::atomic<int> current_threads{0};

void name_case() {
  const char* isa = thrifty_isa_name(thrifty_isa_selected());
  std::fprintf(stderr, "in case %s on %s, %d threads\n", current.load(), isa, current_threads.load());
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  name_case();
  std::_Exit(1);
}

class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    room_ = (bytes + page - 1) / page * page;
    mapped_ = room_ + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) fail("no memory");
    if (room_ > 0 && mprotect(base_ + page, room_, PROT_READ | PROT_WRITE) != 0) fail("no memory");
    slack_ = room_ - bytes;
    data_ = base_ + page + slack_;
    if (__asan_poison_memory_region) __asan_poison_memory_region(base_ + page, slack_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(data_ - slack_, slack_);
    munmap(base_, mapped_);
  }

  char* data() const { return data_; }

 private:
  char *base_, *data_;
  size_t room_, mapped_, slack_;
};

/// The arrays of a case for one caller.
class Memory {
 public:
  explicit Memory(const Case& c) {
    for (const Array& a : c.arrays) arrays_.push_back(std::make_unique<Guarded>(a.bytes));
  }

  void fill(const Case& c) {
    for (size_t i = 0; i < arrays_.size(); ++i) {
      const Array& a = c.arrays[i];
      if (a.check == kCache) {
        std::memset(data(i), 0xFF, a.bytes);  // NaN in every float format
      } else if (a.bytes > 0) {
        std::memcpy(data(i), a.start.data(), a.bytes);
      }
    }
  }

  char* data(size_t i) const { return arrays_[i]->data(); }

 private:
  std::vector<std::unique_ptr<Guarded>> arrays_;
};

class Arguments {
 public:
  Arguments(const Call& call, const Memory& memory) : call_(call), memory_(memory) {}

  int64_t operator()(size_t i) const { return call_.n[i]; }
  int i(size_t index) const { return int(call_.n[index]); }
  float f(size_t index) const { return float(call_.f[index]); }
  template <class T>
  T* p(size_t i) const {
    return call_.n[i] < 0 ? nullptr : reinterpret_cast<T*>(memory_.data(size_t(call_.n[i])));
  }

 private:
  const Call& call_;
  const Memory& memory_;
};

/// n_ops; of each op code, flags, n, p; then the fields of the batch, every cache as base, capacity and states;
/// seconds.
int64_t run_program(const Arguments& a, int threads) {
  const int64_t n_ops = a(0);
  size_t at = 1;
  std::vector<thrifty_op> ops(size_t(n_ops < 1 ? 1 : n_ops));
  for (int64_t i = 0; i < n_ops; ++i) {
    thrifty_op& op = ops[size_t(i)];
    op.code = int32_t(a.i(at++));
    op.flags = int32_t(a.i(at++));
    for (auto& n : op.n) n = a(at++);
    for (auto& p : op.p) p = a.p<void>(at++);
    op.f[0] = a.f(size_t(2 * i));
    op.f[1] = a.f(size_t(2 * i + 1));
  }
  thrifty_batch b{};
  b.n = a(at++);
  b.tokens = a.p<int32_t>(at++);
  b.positions = a.p<int32_t>(at++);
  b.slots = a.p<int32_t>(at++);
  b.n_outputs = a(at++);
  b.outputs = a.p<int32_t>(at++);
  b.n_caches = a(at++);
  std::vector<thrifty_slot> slots(size_t(b.n_caches));
  for (auto& slot : slots) {
    slot.base = a.p<void>(at++);
    slot.capacity = a(at++);
    slot.states = a.p<void>(at++);
  }
  b.caches = slots.data();
  return thrifty_run(ops.data(), n_ops, &b, threads, a.p<double>(at));
}

/// A measure's status; `wanted` is whether it has a place for its rate.
template <class Measure>
int64_t rate_of(int64_t wanted, const Measure& measure) {
  double rate = -1;
  const int status = measure(wanted ? &rate : nullptr);
  if (status == THRIFTY_OK && !(rate > 0)) fail("a rate of " + std::to_string(rate));
  return status;
}

int64_t copy_cache(const Arguments& a) {
  const thrifty_slot slot{a.p<void>(4), a(5), nullptr};
  return thrifty_cache_copy(a.i(0), a(1), a(2), a(3), &slot, a(6), a.p<void>(7), a.p<void>(8), a.p<float>(9),
                            a.p<float>(10), a.i(11));
}

int64_t use_memory(size_t bytes) {
  char* buffer = static_cast<char*>(thrifty_buffer_alloc(bytes));
  if (buffer == nullptr || reinterpret_cast<uintptr_t>(buffer) % 64 != 0) fail("memory that is not aligned");
  std::memset(buffer, 1, bytes);
  thrifty_buffer_free(buffer);
  return 0;
}

/// In the order of FUNCTIONS in native_cases.py.
enum Function : int64_t {
  kPackSize,
  kCacheSize,
  kCacheCopy,
  kIsaSelect,
  kBuffer,
  kCacheEvict,
  kPack,
  kUnpack,
  kRepack,
  kTernaryMatmul,
  kQuantizePerToken,
  kRmsNorm,
  kGlu,
  kReadBandwidth,
  kInt8Peak,
  kRun,
  kProductKeyTopk,
  kProductKeyExperts,
  kKeptUntil,
  kGgufEncode,
  kGgufDecode,
  kQuantizeQ8,
  kDequantizeQ8
};

int64_t run_call(const Call& call, const Memory& memory, int threads) {
  const Arguments a(call, memory);
  switch (call.function) {
    case kPackSize: return int64_t(thrifty_pack_size(a.i(0), a(1), a(2)));
    case kCacheSize: return int64_t(thrifty_cache_size(a.i(0), a(1), a(2), a(3), a(4)));
    case kCacheCopy: return copy_cache(a);
    case kIsaSelect: return thrifty_isa_select(a.p<char>(0));
    case kBuffer: return use_memory(size_t(a(0)));
    case kCacheEvict: return thrifty_cache_evict(a.p<void>(0), size_t(a(1))), 0;
    case kPack: return thrifty_pack(a.i(0), a(1), a(2), a.p<int8_t>(3), a.p<uint8_t>(4), threads);
    case kUnpack: return thrifty_unpack(a.i(0), a(1), a(2), a.p<uint8_t>(3), a.p<int8_t>(4), threads);
    case kRepack: return thrifty_repack(a.i(0), a.p<uint8_t>(1), a(2), a(3), a.p<uint8_t>(4), a(5), a(6), threads);
    case kTernaryMatmul:
      return thrifty_ternary_matmul(a.i(0), a.p<uint8_t>(1), a(2), a(3), a.p<float>(4), a(5), a.p<float>(6),
                                    a.p<int8_t>(7), a(8), a.p<float>(9), a(10), a.p<float>(11), threads);
    case kQuantizePerToken:
      return thrifty_quantize_per_token(a.p<float>(0), a.p<float>(1), a.f(0), a.i(2), a(3), a(4), a.p<int8_t>(5), a(6),
                                        a.p<float>(7), threads);
    case kRmsNorm: return thrifty_rms_norm(a.p<float>(0), a.p<float>(1), a.f(0), a(2), a(3), a.p<float>(4), threads);
    case kGlu: return thrifty_glu(a.p<float>(0), a.p<float>(1), a.i(2), a(3), a.p<float>(4), threads);
    case kReadBandwidth:
      return rate_of(a(3), [&](double* rate) {
        return thrifty_read_bandwidth(a.p<void>(0), size_t(a(1)), a.i(2), threads, rate);
      });
    case kInt8Peak: return rate_of(a(0), [&](double* rate) { return thrifty_int8_peak(threads, call.f[0], rate); });
    case kRun: return run_program(a, threads);
    case kProductKeyTopk:
      return thrifty_product_key_topk(a.p<float>(0), a(1), a.p<float>(2), a(3), a(4), a(5), a(6), a.p<float>(7),
                                      a.p<int64_t>(8), threads);
    case kProductKeyExperts:
      return thrifty_product_key_experts(a.p<float>(0), a.p<int64_t>(1), a.p<float>(2), a.p<void>(3), a.p<void>(4),
                                         a.i(5), a.i(6), a(7), a(8), a(9), a(10), a.p<float>(11), a.p<float>(12),
                                         threads);
    case kKeptUntil:
      return thrifty_kept_until(a.p<float>(0), a(1), a(2), a(3), a.p<uint64_t>(4), a.p<int64_t>(5), threads);
    case kGgufEncode: return thrifty_gguf_encode(a.i(0), a.p<int8_t>(1), a(2), a(3), a.f(0), a.p<uint8_t>(4), threads);
    case kGgufDecode:
      return thrifty_gguf_decode(a.i(0), a.p<uint8_t>(1), a(2), a(3), a.p<int8_t>(4), a.p<float>(5), threads);
    case kQuantizeQ8: return thrifty_quantize_q8_0(a.p<void>(0), a.i(1), a(2), a(3), a.p<uint8_t>(4), threads);
    case kDequantizeQ8: return thrifty_dequantize_q8_0(a.p<uint8_t>(0), a(1), a(2), a.p<float>(3), threads);
    default: fail("no function " + std::to_string(call.function));
  }
}

void check_bytes(const std::string& what, const std::vector<char>& expected, const char* got) {
  if (expected.empty() || std::memcmp(expected.data(), got, expected.size()) == 0) return;
  size_t at = 0;
  while (expected[at] == got[at]) ++at;
  fail(what + ": byte " + std::to_string(at) + " of " + std::to_string(expected.size()) + " differs");
}

void check_close(const std::string& what, const Array& a, const char* got) {
  for (size_t i = 0; i < a.bytes; i += sizeof(float)) {
    float expected, value;
    std::memcpy(&expected, &a.expected[i], sizeof expected);
    std::memcpy(&value, got + i, sizeof value);
    if (std::fabs(double(value) - double(expected)) <= a.tolerance) continue;
    fail(what + ": element " + std::to_string(i / sizeof(float)) + " is " + std::to_string(value) + ", not " +
         std::to_string(expected));
  }
}

void run_case(const Case& c, Memory& memory, int threads, Bits& bits) {
  current = c.name.c_str();
  current_threads = threads;
  memory.fill(c);
  for (size_t i = 0; i < c.calls.size(); ++i) {
    const int64_t result = run_call(c.calls[i], memory, threads);
    if (result == c.calls[i].result) continue;
    fail("call " + std::to_string(i) + " gave " + std::to_string(result) + ", not " +
         std::to_string(c.calls[i].result));
  }
  bits.resize(c.arrays.size());
  for (size_t i = 0; i < c.arrays.size(); ++i) {
    const Array& a = c.arrays[i];
    const std::string what = "array " + std::to_string(i);
    const char* got = memory.data(i);
    if (a.check == kGiven) check_bytes(what + ", which was given", a.start, got);
    if (a.check == kExact) check_bytes(what, a.expected, got);
    if (a.check != kClose) continue;
    check_close(what, a, got);
    check_bytes(what + " on another thread count", bits[i], got);
    bits[i].assign(got, got + a.bytes);
  }
}

void run_case(const Case& c, int threads) {
  Memory memory(c);
  Bits bits;
  run_case(c, memory, threads, bits);
}

void run_threads(const std::vector<Case>& cases) {
  for (const Case& c : cases) {
    Memory memory(c);
    Bits bits;
    for (int threads : {1, 2, 3, 7}) run_case(c, memory, threads, bits);
  }
}

/// One from the front and one from the back, so that different ops meet in the pool.
void run_two_callers(const std::vector<Case>& cases) {
  std::thread other([&] {
    for (auto c = cases.rbegin(); c != cases.rend(); ++c) run_case(*c, 2);
  });
  for (const Case& c : cases) run_case(c, 3);
  other.join();
}

/// Whether this process has as many threads, where that can be told.
bool has_threads(long count) {
  const std::filesystem::path tasks = "/proc/self/task";
  if (!std::filesystem::exists(tasks)) return true;
  return std::distance(std::filesystem::directory_iterator(tasks), {}) >= count;
}

/// Every tenth case in a child, which has none of its parent's threads and makes its own.
void run_child(const std::vector<Case>& cases) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    for (size_t i = 0; i < cases.size(); i += 10) run_case(cases[i], 3);
    if (!has_threads(3)) fail("a forked child has no threads");
    _exit(0);
  }
  int status = -1;
  if (child < 0 || waitpid(child, &status, 0) != child || status != 0) fail("a forked child failed");
}

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) fail("there is no case file");
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;
  ~Reader() { std::fclose(file_); }

  std::vector<Case> cases() {
    const int64_t count = number();
    std::vector<Case> all(static_cast<size_t>(count));
    for (Case& c : all) {
      const auto name = some<char>();
      c.name.assign(name.begin(), name.end());
      c.arrays.resize(size_t(number()));
      for (Array& a : c.arrays) read(a);
      c.calls.resize(size_t(number()));
      for (Call& call : c.calls) {
        call.function = number();
        call.result = number();
        call.n = some<int64_t>();
        call.f = some<double>();
      }
    }
    return all;
  }

 private:
  template <class T>
  std::vector<T> take(size_t count) {
    std::vector<T> values(count);
    if (count > 0 && std::fread(values.data(), sizeof(T), count, file_) != count) fail("the case file ends early");
    return values;
  }
  int64_t number() { return take<int64_t>(1)[0]; }
  /// A count, then as many values.
  template <class T>
  std::vector<T> some() {
    return take<T>(size_t(number()));
  }

  void read(Array& a) {
    a.check = Check(number());
    a.tolerance = take<double>(1)[0];
    a.start = some<char>();
    a.expected = some<char>();
    a.bytes = a.start.size();
    if (a.check != kCache) return;
    int64_t n[5];
    std::memcpy(n, a.start.data(), sizeof n);
    a.bytes = thrifty_cache_size(int(n[0]), n[1], n[2], n[3], n[4]);
  }

  std::FILE* file_;
};

}  // namespace

int main(int argc, char** argv) {
  const bool shared = argc == 3 && std::strcmp(argv[2], "shared") == 0;
  if (argc != 2 && !shared) fail("usage: driver CASES [shared]");
  std::signal(SIGABRT, [](int) { name_case(); });
  const std::vector<Case> cases = Reader(argv[1]).cases();
  for (int isa = 0; isa < THRIFTY_ISA_COUNT; ++isa) {
    const char* name = thrifty_isa_name(isa);
    if (!(thrifty_isa_detected() >> isa & 1)) continue;
    if (thrifty_isa_select(name) != THRIFTY_OK) fail(std::string("this build lacks ") + name);
    run_threads(cases);
    if (shared) {
      run_two_callers(cases);
      run_child(cases);
    }
    std::printf("%s ", name);
    std::fflush(stdout);
  }
  std::printf("%zu\n", cases.size());
  return 0;
}
