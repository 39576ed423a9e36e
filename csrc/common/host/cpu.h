// SPDX-License-Identifier: Apache-2.0
//
// What the operators' CPU sides share.
#pragma once

#include <vector>

#include "common/host/op_call.h"
#include "common/time_segments.h"

namespace mambablock {

// The values of state_indices, each negative or one row of the `rows` in the state and no other's;
// without them every row of the batch has its own state row.
std::vector<int64_t> state_rows(const Checks& checks, const OptionalTensor& state_indices,
                                int64_t rows);

// The segments of one row, cut at multiples of the tile. With reverse=True the row is the flipped
// one, and `sequence` still counts from the row's true beginning.
std::vector<Segment> row_segments(const OpCall& call, int64_t length, int64_t tile);

inline RowSegments view_of(const std::vector<Segment>& segments) {
  return {segments.data(), int64_t(segments.size())};
}

}  // namespace mambablock
