# SPDX-License-Identifier: Apache-2.0
"""Other libraries' models on mambablock's operators."""
