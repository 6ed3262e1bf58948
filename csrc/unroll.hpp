#pragma once

// Before a loop: spares the copies of accumulators that GCC makes at every turn of one.
#if defined(__clang__)
#define THRIFTY_UNROLL _Pragma("unroll(4)")
#elif defined(__GNUC__)
#define THRIFTY_UNROLL _Pragma("GCC unroll 4")
#else
#define THRIFTY_UNROLL
#endif
