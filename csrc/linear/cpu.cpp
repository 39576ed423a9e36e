// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "linear/backend.h"
#include "linear/cpu/kernels.h"

namespace mambablock {

void run_linear(const LinearParams& p) {
  // A region of threads costs about as much as reading this many elements of the weight.
  constexpr int64_t least_elements = 16384;
  const int64_t grain = (least_elements + p.in_features - 1) / (p.in_features + 1) + 1;
  const auto kernel = MAMBABLOCK_SELECT(linear);
  torch::stable::parallel_for(0, p.out_features, grain,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace mambablock
