// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "selective_scan/cpu/kernels.h"
#include "selective_scan_carry/params.h"

namespace mambablock {

// As the scan's kernels, over its work items.
MAMBABLOCK_DECLARE_KERNEL(void, selective_scan_carry,
                          (const SelectiveScanCarry&, RowSegments, int64_t begin, int64_t end));
MAMBABLOCK_DECLARE_KERNEL(void, selective_scan_carry_backward,
                          (const SelectiveScanCarry&, RowSegments, int64_t begin, int64_t end));

}  // namespace mambablock
