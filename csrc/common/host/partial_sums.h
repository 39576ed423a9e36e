// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/host/boxing.h"

namespace mambablock {

// `count` partial sums, which follow one another in `partials`, of a total in the shape and type of
// `like`.
struct PartialSums {
  Tensor partials;
  int64_t count;
  Tensor like;
};

// Their totals. The order in which partial sums are added depends on their count alone. Each device
// has its own.
std::vector<Tensor> sum_partials(const std::vector<PartialSums>& sums);

}  // namespace mambablock
