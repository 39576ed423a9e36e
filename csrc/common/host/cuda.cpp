// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda.h"

#include "common/cuda/boundaries.h"
#include "common/cuda/sums.h"

namespace mambablock {

const int64_t* device_boundaries(const CudaContext& context, OpCall& call, int64_t length) {
  if (!call.cu_seqlens) return nullptr;
  const Tensor& cu_seqlens = *call.cu_seqlens;
  const Tensor boundaries =
      torch::stable::new_empty(cu_seqlens, {call.states + 1}, ScalarType::Long);
  call.kept.push_back(boundaries);
  int64_t* target = static_cast<int64_t*>(boundaries.mutable_data_ptr());
  const auto write = [&](const auto* values) {
    write_boundaries(call.checks.op(), values, cu_seqlens.stride(0), call.states, length,
                     call.reverse, target, context.stream());
  };
  if (cu_seqlens.scalar_type() == ScalarType::Int) {
    write(static_cast<const int32_t*>(cu_seqlens.const_data_ptr()));
  } else {
    write(static_cast<const int64_t*>(cu_seqlens.const_data_ptr()));
  }
  return target;
}

Tensor sum_partials(const Tensor& partials, int64_t count, const Tensor& like) {
  const CudaContext context(partials);
  const Tensor total = torch::stable::new_empty(like, like.sizes());
  sum_rows("sum_partials", dtype_of("sum_partials", "like", like.scalar_type()),
           partials.const_data_ptr(), count, like.numel(), total.mutable_data_ptr(),
           context.stream());
  return total;
}

}  // namespace mambablock
