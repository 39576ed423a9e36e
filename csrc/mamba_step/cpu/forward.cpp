// SPDX-License-Identifier: Apache-2.0
#include <math.h>

#include "causal_conv1d_update/cpu/kernels.h"
#include "common/cpu/simd.h"
#include "linear/cpu/kernels.h"
#include "mamba_step/cpu/kernels.h"
#include "selective_state_update/cpu/kernels.h"

namespace mambablock {
namespace MAMBABLOCK_SIMD_LEVEL {
namespace {

// Rows [begin, end) of a parameter as accumulators, through `function`.
template <class A, class F>
void convert(const StepParameter& parameter, int64_t begin, int64_t end, F function) {
  if (parameter.data == nullptr || parameter.accumulators == nullptr) return;
  A* target = static_cast<A*>(parameter.accumulators);
  dispatch_dtype(parameter.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) <= sizeof(A)) {
      const T* source = static_cast<const T*>(parameter.data);
      const int64_t last = end * parameter.columns;
      for (int64_t i = begin * parameter.columns; i < last; i += kLanes<A>) {
        const int64_t count = last - i < kLanes<A> ? last - i : kLanes<A>;
        store_converted(target + i, 1, function(load_converted<A>(source + i, 1, count)), count);
      }
    }
  });
}

// Calls function(A{}) with the accumulator's type.
template <class F>
void dispatch_accumulator(const MambaStepParams& p, F function) {
  p.scan.dtype == DType::float64 ? function(double{}) : function(float{});
}

template <class A>
void normalize(const MambaStepParams& p, int64_t row) {
  A* values = static_cast<A*>(p.x_proj.y) + row * p.x_proj.y_row;
  for (int i = 0; i < 3; values += p.norm_sizes[i++]) {
    const A* weight = static_cast<const A*>(p.norm_weights[i]);
    const int64_t size = p.norm_sizes[i];
    A squares = 0;
    for (int64_t k = 0; k < size; ++k) squares += values[k] * values[k];
    const A scale = A(1) / sqrt(squares / A(size) + A(p.norm_eps));
    for (int64_t k = 0; k < size; ++k) {
      values[k] *= weight == nullptr ? scale : scale * weight[k];
    }
  }
}

}  // namespace

void mamba_step_convolve(const MambaStepParams& p, const int64_t* state_rows, int64_t begin,
                         int64_t end) {
  const int64_t d_inner = p.conv.channels;
  linear(p.in_proj, begin, end);
  linear(p.in_proj, d_inner + begin, d_inner + end);
  dispatch_accumulator(p, [&](auto zero) {
    for (int i = 0; i < 2; ++i) {
      convert<decltype(zero)>(p.parameters[i], begin, end, [](auto v) { return v; });
    }
  });
  for (int64_t b = 0; b < p.conv.batch; ++b) {
    causal_conv1d_update(p.conv, state_rows, b * d_inner + begin, b * d_inner + end);
  }
}

void mamba_step_select(const MambaStepParams& p, int64_t begin, int64_t end) {
  linear(p.x_proj, begin, end);
}

void mamba_step_normalize(const MambaStepParams& p, int64_t begin, int64_t end) {
  dispatch_accumulator(p, [&](auto zero) {
    for (int64_t row = begin; row < end; ++row) normalize<decltype(zero)>(p, row);
  });
}

void mamba_step_scan(const MambaStepParams& p, const int64_t* state_rows, int64_t begin,
                     int64_t end) {
  const int64_t d_inner = p.scan.channels;
  linear(p.dt_proj, begin, end);
  dispatch_accumulator(p, [&](auto zero) {
    using A = decltype(zero);
    for (int i = 2; i < 4; ++i) {
      convert<A>(p.parameters[i], begin, end, [](auto v) { return v; });
    }
    convert<A>(p.A_log, begin, end, [](auto v) { return decltype(v)(-exp(v)); });
  });
  for (int64_t b = 0; b < p.scan.batch; ++b) {
    selective_state_update(p.scan, state_rows, b * d_inner + begin, b * d_inner + end);
  }
}

void mamba_step_project(const MambaStepParams& p, const int64_t* state_rows, int64_t begin,
                        int64_t end) {
  linear(p.out_proj, begin, end);
  dispatch_dtype(p.out_proj.y_dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t b = 0; b < p.out_proj.rows; ++b) {
      if (state_rows[b] >= 0) continue;
      T* y = static_cast<T*>(p.out_proj.y) + b * p.out_proj.y_row;
      for (int64_t n = begin; n < end; ++n) y[n] = T{};
    }
  });
}

}  // namespace MAMBABLOCK_SIMD_LEVEL
}  // namespace mambablock
