// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/cpu/simd_level.h"
#include "mamba_step/params.h"

namespace mambablock {

// The stages of a step, which follow one another. Each is given a part of its rows of weights, and
// all rows of the batch: channels [begin, end), or features of the output.
//
// in_proj, the convolution and its SiLU.
MAMBABLOCK_DECLARE_KERNEL(void, mamba_step_convolve,
                          (const MambaStepParams&, const int64_t* state_rows, int64_t begin,
                           int64_t end));
// x_proj.
MAMBABLOCK_DECLARE_KERNEL(void, mamba_step_select,
                          (const MambaStepParams&, int64_t begin, int64_t end));
// The norms of dt, B and C, of rows of the batch.
MAMBABLOCK_DECLARE_KERNEL(void, mamba_step_normalize,
                          (const MambaStepParams&, int64_t begin, int64_t end));
// dt_proj, the state update and the gate.
MAMBABLOCK_DECLARE_KERNEL(void, mamba_step_scan,
                          (const MambaStepParams&, const int64_t* state_rows, int64_t begin,
                           int64_t end));
// out_proj; padding rows are 0.
MAMBABLOCK_DECLARE_KERNEL(void, mamba_step_project,
                          (const MambaStepParams&, const int64_t* state_rows, int64_t begin,
                           int64_t end));

}  // namespace mambablock
