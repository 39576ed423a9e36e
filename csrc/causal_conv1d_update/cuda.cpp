// SPDX-License-Identifier: Apache-2.0
#include "causal_conv1d_update/cuda/kernels.h"

#include "common/host/cuda_context.h"
#include "causal_conv1d_update/backend.h"

namespace mambablock {

void run_update(CausalConv1dUpdateParams params, const Checks& checks,
                const OptionalTensor& state_indices) {
  const CudaContext context(checks.input());
  const OptionalTensor rows = contiguous_as(state_indices, ScalarType::Long);
  params.state_rows = static_cast<const int64_t*>(data_of(rows));
  cuda_update(checks.op(), params, context.stream());
}

}  // namespace mambablock
