// SPDX-License-Identifier: Apache-2.0
#include "common/host/cpu.h"
#include "selective_state_update/backend.h"

namespace mambablock {

void run_update(SelectiveStateUpdateParams params, const Checks& checks,
                const OptionalTensor& state_indices) {
  const std::vector<int64_t> rows = state_rows(checks, state_indices, params.batch, params.rows);
  params.state_rows = rows.data();
  const auto kernel = MAMBABLOCK_SELECT(selective_state_update);
  torch::stable::parallel_for(0, params.batch * params.channels, 512,
                              [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
}

}  // namespace mambablock
