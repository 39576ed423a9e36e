// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/op_call.h"
#include "selective_scan_carry/params.h"

namespace mambablock {

// What op.cpp asks of a device, in cpu.cpp and cuda.cpp.
void carry_forward(const OpCall& call, const SelectiveScanCarry& p);
void carry_backward(const OpCall& call, const SelectiveScanCarry& p);

}  // namespace mambablock
