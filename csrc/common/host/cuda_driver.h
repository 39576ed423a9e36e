// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace mambablock {

// The runtime is part of the library and may be of a newer major release than torch's own. A driver
// that is too old for it would fail every call, with an error that names neither.
inline void check_driver() {
  static const bool checked [[maybe_unused]] = [] {
    int driver = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    const auto text = [](int version) {
      return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
    };
    // Within a major release, newer runtimes run on older drivers.
    if (error != cudaSuccess || driver / 1000 < CUDART_VERSION / 1000) {
      throw std::runtime_error(
          "mambablock: the NVIDIA driver must be one for CUDA " +
          std::to_string(CUDART_VERSION / 1000) +
          ".0 or newer, since the library was built with CUDA " + text(CUDART_VERSION) + "; got " +
          (driver == 0 ? std::string("no driver") : "one for CUDA " + text(driver)) +
          "; update the driver, or build mambablock with an older nvcc");
    }
    return true;
  }();
}

}  // namespace mambablock
