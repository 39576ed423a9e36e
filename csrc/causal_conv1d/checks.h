// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"

namespace mambablock {

// The checks of what causal_conv1d and causal_conv1d_update have in common; returns d_conv.
template <class Arguments>
Size check_conv(const Checks& checks, const Arguments& a) {
  const Size width = checks.matrix("weight", a.weight, checks.channels(), "d_conv");
  checks.parameter("bias", a.bias, {checks.channels()});
  return width;
}

}  // namespace mambablock
