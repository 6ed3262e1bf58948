#pragma once

#include <cmath>

namespace thrifty {
namespace {

/// log(1 + e^x), x itself where the difference is below the last bit of a float.
inline double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

}  // namespace
}  // namespace thrifty
