// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <vector>

#include "common/host/boxing.h"
#include "common/views.h"

namespace mambablock {

// `count` partial sums, which follow one another in `partials`, of a total in the shape and type of
// `like`, multiplied by `factor` if there is one.
struct PartialSums {
  Tensor partials;
  int64_t count;
  Tensor like;
  ParameterView factor{};
};

// Their totals. The order in which partial sums are added depends on their count alone. Each device
// has its own.
std::vector<Tensor> sum_partials(const std::vector<PartialSums>& sums);

}  // namespace mambablock
