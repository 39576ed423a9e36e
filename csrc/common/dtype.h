// SPDX-License-Identifier: Apache-2.0
//
// The four activation types as the kernels see them.
#pragma once

#include <stdint.h>

#include <type_traits>

namespace mambablock {

enum class DType { float32, bfloat16, float16, float64 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// The type that a kernel computes in and keeps states in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls function(T{}) with the C++ type of `dtype`.
template <class F>
inline void dispatch_dtype(DType dtype, F function) {
  switch (dtype) {
    case DType::float32:
      return function(float{});
    case DType::bfloat16:
      return function(BFloat16{});
    case DType::float16:
      return function(Float16{});
    case DType::float64:
      return function(double{});
  }
}

}  // namespace mambablock
