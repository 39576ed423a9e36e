// SPDX-License-Identifier: Apache-2.0
//
// A row of length L holds one sequence, or S packed ones. CPU kernels walk it in segments: the
// pieces between the multiples of a tile and the starts of sequences.
#pragma once

#include <stdint.h>

#include <vector>

namespace mambablock {

struct Segment {
  int64_t begin, end;      // time steps of the row
  int64_t sequence;        // which of the row's sequences
  int64_t sequence_begin;  // where it begins in the row
  int64_t sequence_end;
  bool starts() const { return begin == sequence_begin; }
  bool ends() const { return end == sequence_end; }
};

// The segments of one row, as kernels are given them.
struct RowSegments {
  const Segment* data;
  int64_t count;
};

// The segments of a row in order of time; an empty sequence is one empty segment.
// `boundaries` are the S+1 boundaries of the packed sequences.
inline std::vector<Segment> time_segments(const std::vector<int64_t>& boundaries, int64_t tile) {
  std::vector<Segment> segments;
  for (int64_t sequence = 0; sequence + 1 < int64_t(boundaries.size()); ++sequence) {
    const int64_t first = boundaries[sequence], last = boundaries[sequence + 1];
    int64_t begin = first;
    do {
      const int64_t tile_end = (begin / tile + 1) * tile;
      const int64_t end = tile_end < last ? tile_end : last;
      segments.push_back({begin, end, sequence, first, last});
      begin = end;
    } while (begin < last);
  }
  return segments;
}

}  // namespace mambablock
