// SPDX-License-Identifier: Apache-2.0
#include "races.h"

#include <string.h>

#include <algorithm>

namespace mambablock_emulation {
namespace {

// Bytes that a cell stands for: of shared memory, which holds accumulators, and of other memory.
constexpr uintptr_t kSharedBytes = 4, kGlobalBytes = 2, kPageBytes = 4096;
constexpr size_t kMostPages = 4096;

}  // namespace

void RaceDetector::start_launch(const void* shared, size_t shared_bytes) {
  shared_ = reinterpret_cast<uintptr_t>(shared);
  shared_bytes_ = shared_bytes;
  shared_cells_.assign((shared_bytes + kSharedBytes - 1) / kSharedBytes, Cell{});
  if (pages_.size() > kMostPages) pages_.clear();
  last_ = nullptr;
  first_of_launch_ = ++epoch_;
}

void RaceDetector::start_block(unsigned threads) {
  threads_ = threads;
  first_of_block_ = ++epoch_;
  clocks_.assign(size_t(threads) * 32, 0);
  for (unsigned i = 0; i < threads; ++i) clocks_[i * 32 + i % 32] = 1;
}

void RaceDetector::warp_synced(unsigned first_thread, unsigned mask) {
  Clock latest[32] = {};
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    for (unsigned j = 0; j < 32; ++j) {
      latest[j] = std::max(latest[j], clocks_[(first_thread + i) * 32 + j]);
    }
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    Clock* own = &clocks_[(first_thread + i) * 32];
    memcpy(own, latest, sizeof latest);
    ++own[i];
  }
}

RaceDetector::Cell& RaceDetector::global_cell(uintptr_t address) {
  const uintptr_t page = address / kPageBytes;
  if (last_ == nullptr || page != last_page_) {
    auto& found = pages_[page];
    if (found == nullptr) found = std::make_unique<Page>();
    last_ = found.get();
    last_page_ = page;
  }
  return last_->cells[address % kPageBytes / kGlobalBytes];
}

// Whether what a lane of the same warp did at `clock` comes before what `self` does now.
bool RaceDetector::ordered(unsigned lane, Clock clock, unsigned self) const {
  return lane == self % 32 || clocks_[self * 32 + lane] >= clock;
}

bool RaceDetector::reads_ordered(const Cell& cell, unsigned self) const {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (cell.read_lanes >> lane & 1 && !ordered(lane, cell.read_clock, self)) return false;
  }
  return true;
}

const char* RaceDetector::conflict(Cell& cell, bool is_write, unsigned self, bool is_shared) const {
  const uint32_t written = cell.write_epoch, read = cell.read_epoch;
  const auto by_another_block = [&](uint32_t epoch) {
    return !is_shared && epoch >= first_of_launch_ && epoch < first_of_block_;
  };
  if (by_another_block(written)) return "another block of the launch wrote";
  if (is_shared && !is_write && written < first_of_block_) return "no thread of the block wrote";
  if (written == epoch_ && written != 0 && cell.write_thread != self &&
      (cell.write_thread / 32 != self / 32 ||
       !ordered(cell.write_thread % 32, cell.write_clock, self))) {
    return "another thread wrote";
  }
  if (!is_write) return nullptr;
  if (by_another_block(read) ||
      (!is_shared && read >= first_of_launch_ && cell.other_blocks_read)) {
    return "another block of the launch read";
  }
  if (read == epoch_ &&
      (cell.several_warps_read || cell.read_warp != self / 32 || !reads_ordered(cell, self))) {
    return "another thread read";
  }
  return nullptr;
}

void RaceDetector::note(Cell& cell, bool is_write, unsigned self) const {
  const Clock clock = clocks_[self * 32 + self % 32];
  if (is_write) {
    cell.write_epoch = epoch_;
    cell.write_thread = uint16_t(self);
    cell.write_clock = clock;
    return;
  }
  const unsigned warp = self / 32, lane = 1u << self % 32;
  if (cell.read_epoch != epoch_) {
    const bool in_launch = cell.read_epoch >= first_of_launch_;
    cell.other_blocks_read =
        in_launch && (cell.other_blocks_read || cell.read_epoch < first_of_block_);
    cell.read_epoch = epoch_;
    cell.several_warps_read = false;
    cell.read_lanes = 0;
  } else if (cell.read_warp != warp) {
    cell.several_warps_read = true;
    cell.read_lanes = 0;
  } else if (reads_ordered(cell, self)) {
    cell.read_lanes = 0;
  }
  cell.read_clock = cell.read_lanes == 0 ? clock : std::max(cell.read_clock, clock);
  cell.read_warp = uint16_t(warp);
  cell.read_lanes |= lane;
}

std::string RaceDetector::access(const void* address, size_t bytes, bool is_write, unsigned self) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const bool is_shared = at - shared_ < shared_bytes_;
  const uintptr_t size = is_shared ? kSharedBytes : kGlobalBytes, start = is_shared ? shared_ : 0;
  for (uintptr_t i = (at - start) / size; i <= (at - start + bytes - 1) / size; ++i) {
    Cell& cell = is_shared ? shared_cells_[i] : global_cell(i * size);
    if (const char* what = conflict(cell, is_write, self, is_shared)) {
      std::string text = is_write ? "writes " : "reads ";
      text += std::to_string(bytes) + " bytes of ";
      text += is_shared ? "shared memory, at byte " + std::to_string(at - shared_) : "memory";
      text += std::string(", which ") + what;
      if (strncmp(what, "another thread", 14) == 0) text += " since they last synchronised";
      return text;
    }
    note(cell, is_write, self);
  }
  return {};
}

}  // namespace mambablock_emulation
