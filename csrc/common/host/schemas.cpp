// SPDX-License-Identifier: Apache-2.0
//
// The operators as PyTorch's dispatcher knows them, whatever the device.
#include <torch/csrc/stable/library.h>

namespace {

#define CAUSAL_CONV1D_ARGUMENTS                                                             \
  "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, bool " \
  "silu, bool reverse"

#define SELECTIVE_SCAN_ARGUMENTS                                                         \
  "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "         \
  "Tensor? delta_bias, Tensor? initial_state, Tensor? cu_seqlens, bool delta_softplus, " \
  "bool reverse, bool A_is_log"

STABLE_TORCH_LIBRARY(mambablock, library) {
  library.def("causal_conv1d(" CAUSAL_CONV1D_ARGUMENTS ") -> (Tensor, Tensor)");
  library.def("causal_conv1d_backward(Tensor dy, Tensor? dfinal_state, " CAUSAL_CONV1D_ARGUMENTS
              ") -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "causal_conv1d_update(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu, "
      "Tensor? state_indices) -> Tensor");
  // Only on the CPU.
  library.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  library.def(
      "mamba_step(Tensor(a!) conv_state, Tensor(b!) ssm_state, Tensor x, Tensor in_proj_weight, "
      "Tensor? in_proj_bias, Tensor conv_weight, Tensor? conv_bias, Tensor x_proj_weight, "
      "Tensor dt_proj_weight, Tensor? dt_proj_bias, Tensor A_log, Tensor D, "
      "Tensor out_proj_weight, Tensor? out_proj_bias, Tensor? dt_norm_weight, "
      "Tensor? B_norm_weight, Tensor? C_norm_weight, float? norm_eps, Tensor? state_indices) -> "
      "Tensor");
  library.def("selective_scan(" SELECTIVE_SCAN_ARGUMENTS
              ", bool save_states) -> (Tensor, Tensor, Tensor)");
  library.def(
      "selective_scan_backward(Tensor dy, Tensor? dfinal_state, Tensor "
      "saved_states, " SELECTIVE_SCAN_ARGUMENTS
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "selective_scan_carry(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor? delta_bias, "
      "Tensor? cu_seqlens, bool delta_softplus, bool reverse) -> (Tensor, Tensor)");
  library.def(
      "selective_scan_carry_backward(Tensor dy, Tensor delta, Tensor A, Tensor C, Tensor? z, "
      "Tensor? delta_bias, Tensor? cu_seqlens, bool delta_softplus, bool reverse) -> Tensor");
  // Only on CUDA: into how many chunks of time a call is divided.
  library.def("selective_scan_chunks(Tensor u, int groups) -> int");
  library.def(
      "selective_state_update(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, "
      "Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, bool delta_softplus, "
      "Tensor? state_indices, bool A_is_log) -> Tensor");
}

}  // namespace
