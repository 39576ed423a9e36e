# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of mambablock on the CPU, next to other implementations: `make bench`."""
