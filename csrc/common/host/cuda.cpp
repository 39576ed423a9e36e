// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "common/cuda/boundaries.h"
#include "common/cuda/sums.h"
#include "common/host/partial_sums.h"

namespace mambablock {

OptionalTensor device_boundaries(const OpCall& call, int64_t length) {
  if (!call.cu_seqlens) return std::nullopt;
  const CudaContext context(call.checks.input());
  const Tensor& cu_seqlens = *call.cu_seqlens;
  const Tensor boundaries =
      torch::stable::new_empty(cu_seqlens, {call.states + 1}, ScalarType::Long);
  const auto write = [&](const auto* values) {
    write_boundaries(call.checks.op(), values, cu_seqlens.stride(0), call.states, length,
                     call.reverse, static_cast<int64_t*>(boundaries.mutable_data_ptr()),
                     context.stream());
  };
  if (cu_seqlens.scalar_type() == ScalarType::Int) {
    write(static_cast<const int32_t*>(cu_seqlens.const_data_ptr()));
  } else {
    write(static_cast<const int64_t*>(cu_seqlens.const_data_ptr()));
  }
  return boundaries;
}

Tensor sum_partials(const Tensor& partials, int64_t count, const Tensor& like) {
  const CudaContext context(partials);
  const Tensor total = torch::stable::new_empty(like, like.sizes());
  sum_rows("sum_partials", dtype_of("sum_partials", "partials", partials.scalar_type()),
           dtype_of("sum_partials", "like", like.scalar_type()), partials.const_data_ptr(), count,
           like.numel(), total.mutable_data_ptr(), context.stream());
  return total;
}

}  // namespace mambablock
