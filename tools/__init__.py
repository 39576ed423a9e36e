# SPDX-License-Identifier: Apache-2.0
"""Programs for the development of mambablock; `pip install` leaves them out."""
