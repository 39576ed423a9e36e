// SPDX-License-Identifier: Apache-2.0
//
// States: those of decoding, which may have any of the four types, and the decay of any.
#pragma once

#include "common/cuda/vectors.cuh"

namespace mambablock {

template <class A>
__device__ __forceinline__ A load_state(DType dtype, const void* state, int64_t at) {
  switch (dtype) {
    case DType::float32:
      return static_cast<const float*>(state)[at];
    case DType::bfloat16:
      return to_accumulator(static_cast<const BFloat16*>(state)[at]);
    case DType::float16:
      return to_accumulator(static_cast<const Float16*>(state)[at]);
    case DType::float64:
      return A(static_cast<const double*>(state)[at]);
  }
  return A(0);
}

template <class A>
__device__ __forceinline__ void store_state(DType dtype, void* state, int64_t at, A value) {
  switch (dtype) {
    case DType::float32:
      static_cast<float*>(state)[at] = float(value);
      break;
    case DType::bfloat16:
      static_cast<BFloat16*>(state)[at] = from_accumulator<BFloat16>(float(value));
      break;
    case DType::float16:
      static_cast<Float16*>(state)[at] = from_accumulator<Float16>(float(value));
      break;
    case DType::float64:
      static_cast<double*>(state)[at] = value;
      break;
  }
}

// The row of the state that row b of the batch uses; negative for padding, which a row past the
// end is too, since values on the device raise nothing.
__device__ __forceinline__ int64_t used_row(const int64_t* state_rows, int64_t rows, int64_t b) {
  const int64_t row = state_rows == nullptr ? b : state_rows[b];
  return row < rows ? row : -1;
}

// 2^exponent * x, by two factors, which overflow or vanish only where the result does. Zeros,
// infinities and NaNs stay, as they do in single steps.
template <class A>
__device__ __forceinline__ A scaled(A x, A exponent) {
  const bool stays = x == 0 || x - x != 0;
  const A factor = exp2(A(0.5) * exponent);
  return stays && exponent == exponent ? x : x * factor * factor;
}

}  // namespace mambablock
