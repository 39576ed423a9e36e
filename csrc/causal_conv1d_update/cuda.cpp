// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d_update/backend.h"
#include "causal_conv1d_update/cuda/kernels.h"
#include "common/host/cuda_context.h"

namespace mambablock {

void run_update(const Checks& checks, const CausalConv1dUpdateParams& p,
                const OptionalTensor& state_indices) {
  const CudaContext context(checks.input());
  const OptionalTensor rows = contiguous_as(state_indices, ScalarType::Long);
  cuda_update(checks.op(), p, static_cast<const int64_t*>(data_of(rows)), context.stream());
}

}  // namespace mambablock
