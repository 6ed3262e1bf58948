// Runs cases that test_neon.py wrote against every instruction set of this build, and exits with 1 at the first
// difference. A case is a list of int64 fields, then its arrays, each in the order in which `run_*` reads them.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "thrifty.h"

namespace {

std::FILE* input;

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> values(count);
  if (std::fread(values.data(), sizeof(T), count, input) != count) {
    std::fprintf(stderr, "the case file ends early\n");
    std::exit(2);
  }
  return values;
}

template <class T>
void compare(const char* what, const std::vector<T>& expected, const std::vector<T>& got) {
  if (std::memcmp(expected.data(), got.data(), expected.size() * sizeof(T)) == 0) return;
  std::printf("%s differs on %s\n", what, thrifty_isa_name(thrifty_isa_selected()));
  std::exit(1);
}

template <class Body>
void on_every_isa(Body body) {
  for (int isa = 0; isa < THRIFTY_ISA_COUNT; ++isa) {
    if (!((thrifty_isa_built() & thrifty_isa_detected()) >> isa & 1)) continue;
    thrifty_isa_select(thrifty_isa_name(isa));
    body();
  }
}

void run_matmul() {
  const auto f = read<int64_t>(6);
  const int64_t format = f[0], rows = f[1], cols = f[2], n = f[3], stride = f[4], scales = f[5];
  const auto codes = read<int8_t>(rows * cols);
  const auto packed = read<uint8_t>(thrifty_pack_size(int(format), rows, cols));
  const auto w_scale = read<float>(scales), bias = read<float>(rows);
  const auto x = read<int8_t>(n * stride);
  const auto x_scales = read<float>(n), y = read<float>(n * rows);

  std::vector<uint8_t> own(packed.size(), 0xAA);
  thrifty_pack(int(format), rows, cols, codes.data(), own.data());
  compare("pack", packed, own);
  on_every_isa([&] {
    for (int threads = 1; threads < 4; ++threads) {
      std::vector<float> got(y.size(), -1e30f);
      thrifty_ternary_matmul(int(format), packed.data(), rows, cols, w_scale.data(), scales, bias.data(), x.data(),
                             stride, x_scales.data(), n, got.data(), threads);
      compare("ternary_matmul", y, got);
    }
  });
}

void run_quantize() {
  const auto f = read<int64_t>(3);
  const int64_t n = f[0], d = f[1], norm = f[2];
  const auto x = read<float>(n * d), gain = read<float>(d);
  const auto codes = read<int8_t>(n * d);
  const auto scales = read<float>(n), normed = read<float>(n * d);
  on_every_isa([&] {
    std::vector<int8_t> got_codes(codes.size(), 0x55);
    std::vector<float> got_scales(scales.size(), -1), got(normed.size(), -1);
    thrifty_quantize_per_token(x.data(), norm ? gain.data() : nullptr, 1e-5f, int(norm), n, d, got_codes.data(), d,
                               got_scales.data(), 2);
    thrifty_rms_norm(x.data(), gain.data(), 1e-5f, n, d, got.data(), 2);
    compare("quantize_per_token", codes, got_codes);
    compare("the scale of quantize_per_token", scales, got_scales);
    compare("rms_norm", normed, got);
  });
}

void run_glu() {
  const auto f = read<int64_t>(2);
  const int64_t count = f[0], activation = f[1];
  const auto gate = read<float>(count), up = read<float>(count), y = read<float>(count);
  const float tolerance = read<float>(1)[0];
  on_every_isa([&] {
    std::vector<float> got(y.size(), std::nanf(""));
    thrifty_glu(gate.data(), up.data(), int(activation), count, got.data(), 2);
    for (size_t i = 0; i < y.size(); ++i) {
      if (std::fabs(got[i] - y[i]) <= tolerance) continue;
      std::printf("glu differs on %s\n", thrifty_isa_name(thrifty_isa_selected()));
      std::exit(1);
    }
  });
}

}  // namespace

int main(int, char** argv) {
  input = std::fopen(argv[1], "rb");
  if (input == nullptr) return 2;
  int64_t kind, cases = 0;
  void (*const runs[])() = {run_matmul, run_quantize, run_glu};
  for (; std::fread(&kind, sizeof(kind), 1, input) == 1; ++cases) runs[kind]();
  on_every_isa([] { std::printf("%s ", thrifty_isa_name(thrifty_isa_selected())); });
  std::printf("%lld\n", static_cast<long long>(cases));
  return 0;
}
