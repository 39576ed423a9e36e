// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"

namespace mambablock {

struct ScanSizes {
  int64_t d_state, groups;
};

// Checks B or C, (steps, d_state) or (steps, groups, d_state); returns the number of groups.
inline int64_t check_groups(const Checks& checks, const char* name, const Tensor& tensor,
                            const Sizes& steps, const Size& d_state) {
  checks.defined(name, tensor);
  const bool grouped = tensor.dim() == int64_t(steps.count) + 2;
  const Size groups{"groups", grouped ? tensor.size(steps.count) : 1};
  checks.activation(name, tensor,
                    grouped ? steps.followed_by({groups, d_state}) : steps.followed_by({d_state}));
  const int64_t channels = checks.channels().value;
  if (groups.value < 1 || channels % groups.value != 0) {
    fail(checks.op(), "groups", "a divisor of d_inner=" + std::to_string(channels), groups.value);
  }
  return groups.value;
}

// The checks of what selective_scan and selective_state_update have in common. `steps` are the
// sizes before the channels: the batch and, of selective_scan, the length.
template <class Arguments>
ScanSizes check_scan(const Checks& checks, const Arguments& a, const Sizes& steps) {
  const Size channels = checks.channels();
  checks.activation("delta", a.delta, steps.followed_by({channels}));
  const Size d_state = checks.matrix("A", a.A, channels, "d_state");
  const Size groups{"groups", check_groups(checks, "B", a.B, steps, d_state)};
  const bool grouped = a.B.dim() == int64_t(steps.count) + 2;
  checks.activation("C", a.C,
                    grouped ? steps.followed_by({groups, d_state}) : steps.followed_by({d_state}));
  checks.parameter("D", a.D, {channels});
  checks.activation("z", a.z, steps.followed_by({channels}));
  checks.parameter("delta_bias", a.delta_bias, {channels});
  return {d_state.value, groups.value};
}

}  // namespace mambablock
