// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "common/host/checks.h"
#include "common/views.h"

namespace mambablock {

// A parameter as the kernels of a device read it, with the memory that this takes.
struct KernelParameter {
  OptionalTensor tensor;
  ParameterView view;
};

// -exp(parameter) stands for a parameter that is a logarithm. Each device has its own.
KernelParameter kernel_parameter(const Checks& checks, const OptionalTensor& parameter,
                                 bool is_log = false);

}  // namespace mambablock
