# SPDX-License-Identifier: Apache-2.0
"""Makes wheels that run on other machines than the one that built them, and checks them."""
