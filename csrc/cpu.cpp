#include "cpu.hpp"

#include "thrifty.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace thrifty {
namespace {

constexpr uint32_t bit(int isa) { return uint32_t{1} << isa; }

#if defined(__x86_64__) || defined(_M_X64)

struct Registers {
  uint32_t eax, ebx, ecx, edx;
};

Registers cpuid(uint32_t leaf) {
  Registers r{};
#if defined(_MSC_VER)
  int words[4];
  __cpuidex(words, static_cast<int>(leaf), 0);
  r = {uint32_t(words[0]), uint32_t(words[1]), uint32_t(words[2]), uint32_t(words[3])};
#else
  __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Register state the operating system saves. Written in assembly because the intrinsic needs a flag for the file.
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
#endif
}

bool has(uint32_t word, int position) { return (word >> position) & 1; }

// Linux saves tiles only for a process that has asked for them, and may refuse. Other systems are not asked.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

uint32_t detect() {
  uint32_t found = bit(THRIFTY_GENERIC);
  if (cpuid(0).eax < 7) return found;
  const Registers one = cpuid(1), seven = cpuid(7);
  const bool osxsave = has(one.ecx, 27), avx = has(one.ecx, 28);
  if (!osxsave || !avx) return found;
  constexpr uint64_t ymm = 0x06, zmm = 0xE6, tiles = 0x60000;
  const uint64_t state = saved_state();
  const bool fma = has(one.ecx, 12), f16c = has(one.ecx, 29);
  if ((state & ymm) == ymm && has(seven.ebx, 5) && fma && f16c) found |= bit(THRIFTY_AVX2);
  const bool f = has(seven.ebx, 16), dq = has(seven.ebx, 17), bw = has(seven.ebx, 30), vl = has(seven.ebx, 31);
  const bool vnni = has(seven.ecx, 11), vbmi = has(seven.ecx, 1);
  if ((state & zmm) == zmm && f && dq && bw && vl && vnni) {
    found |= bit(THRIFTY_AVX512);
    if (vbmi) found |= bit(THRIFTY_AVX512_VBMI);
    const bool tile = has(seven.edx, 24), int8 = has(seven.edx, 25);
    if (vbmi && tile && int8 && (state & tiles) == tiles && tiles_granted()) found |= bit(THRIFTY_AMX);
  }
  return found;
}

#elif defined(__aarch64__) || defined(_M_ARM64)

uint32_t detect() { return bit(THRIFTY_GENERIC) | bit(THRIFTY_NEON); }

#else

uint32_t detect() { return bit(THRIFTY_GENERIC); }

#endif

}  // namespace

uint32_t detected_isas() {
  static const uint32_t found = detect();
  return found;
}

}  // namespace thrifty
