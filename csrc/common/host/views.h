// SPDX-License-Identifier: Apache-2.0
//
// Views of tensors for the kernels; an absent tensor's is null. The `group_channels` channels of
// each group lie in packs of their own: no pack spans two groups.
#pragma once

#include "common/host/boxing.h"
#include "common/views.h"

namespace mambablock {

// Of (batch, time, channel).
InputView input_view(const OptionalTensor& tensor, bool reverse, int64_t group_channels);
OutputView output_view(const Tensor& tensor, bool reverse, int64_t group_channels);

// Of (batch, time, d_state) or (batch, time, group, d_state).
GroupedView grouped_view(const Tensor& tensor, bool reverse);

// The same of one time step: (batch, channel), and (batch, d_state) or (batch, group, d_state).
InputView step_view(const OptionalTensor& tensor);
GroupedView grouped_step_view(const Tensor& tensor);

}  // namespace mambablock
