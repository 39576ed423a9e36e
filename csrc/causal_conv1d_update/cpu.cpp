// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include "causal_conv1d_update/backend.h"
#include "causal_conv1d_update/cpu/kernels.h"

namespace mambablock {

void run_update(const Checks& checks, const CausalConv1dUpdateParams& p,
                const OptionalTensor& state_indices) {
  const std::vector<int64_t> rows = state_rows(checks, state_indices, p.rows);
  const auto kernel = MAMBABLOCK_SELECT(causal_conv1d_update);
  torch::stable::parallel_for(0, p.batch * p.channels, 4096, [&](int64_t begin, int64_t end) {
    kernel(p, rows.data(), begin, end);
  });
}

}  // namespace mambablock
