# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of mambablock next to other implementations: `make bench`, `make gpu-check`."""
