// SPDX-License-Identifier: Apache-2.0
//
// What the operators' CPU sides share.
#pragma once

#include <vector>

#include "common/host/checks.h"
#include "common/time_segments.h"

namespace mambablock {

// The values of an int32 or int64 vector.
std::vector<int64_t> index_values(const Tensor& tensor);

// The values of state_indices, each negative or one row of the `rows` in the state and no other's;
// without them every row of the batch has its own state row.
std::vector<int64_t> state_rows(const Checks& checks, const std::optional<Tensor>& state_indices,
                                int64_t batch, int64_t rows);

// The segments of one row, cut at multiples of the tile. With `reverse` the row is the flipped one,
// and `sequence` still counts from the row's true beginning.
std::vector<Segment> row_segments(const Checks& checks, const std::optional<Tensor>& cu_seqlens,
                                  int64_t batch, int64_t length, int64_t tile, bool reverse);

}  // namespace mambablock
