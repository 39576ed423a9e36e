// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"

#include "selective_state_update/backend.h"
#include "selective_state_update/cpu/kernels.h"

namespace mambablock {

void run_update(const Checks& checks, const SelectiveStateUpdateParams& p,
                const OptionalTensor& state_indices) {
  const std::vector<int64_t> rows = state_rows(checks, state_indices, p.rows);
  const auto kernel = MAMBABLOCK_SELECT(selective_state_update);
  torch::stable::parallel_for(0, p.batch * p.channels, 512, [&](int64_t begin, int64_t end) {
    kernel(p, rows.data(), begin, end);
  });
}

}  // namespace mambablock
