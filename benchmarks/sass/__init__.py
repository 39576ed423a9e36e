# SPDX-License-Identifier: Apache-2.0
"""A static account of the CUDA kernels: what they issue per state-step, told without a GPU."""
