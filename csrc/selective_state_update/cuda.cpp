// SPDX-License-Identifier: Apache-2.0
#include "common/host/cuda_context.h"
#include "selective_state_update/backend.h"
#include "selective_state_update/cuda/kernels.h"

namespace mambablock {

void run_update(const Checks& checks, const SelectiveStateUpdateParams& p,
                const OptionalTensor& state_indices) {
  const CudaContext context(checks.input());
  const OptionalTensor rows = contiguous_as(state_indices, ScalarType::Long);
  cuda_update(checks.op(), p, static_cast<const int64_t*>(data_of(rows)), context.stream());
}

}  // namespace mambablock
