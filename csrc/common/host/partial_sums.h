// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/boxing.h"

namespace mambablock {

// The sum of `count` partial sums, which follow one another in `partials`, added in that order; in
// the shape and type of `like`. Each device has its own.
Tensor sum_partials(const Tensor& partials, int64_t count, const Tensor& like);

}  // namespace mambablock
