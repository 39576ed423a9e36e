// SPDX-License-Identifier: Apache-2.0
//
// A race detector: kernels are compiled with the thread sanitizer's instrumentation, whose calls
// come here with every access to memory. Two accesses to the same memory, of which one writes, must
// be ordered: by __syncthreads, by __syncwarp within a warp, or by the end of a launch.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace mambablock_emulation {

class RaceDetector {
 public:
  void start_launch(const void* shared, size_t shared_bytes);
  void start_block(unsigned threads);
  void end_launch() { threads_ = 0; }

  // What orders accesses.
  void block_synced() { ++epoch_; }
  void warp_synced(unsigned first_thread, unsigned mask);

  // What is wrong with an access of thread `self`, or nothing.
  std::string access(const void* address, size_t bytes, bool is_write, unsigned self);

 private:
  using Clock = uint32_t;

  // The accesses to some bytes, of the last epoch that has any. An epoch is the time between two
  // barriers of one block; blocks run one after the other, so an epoch tells its block and launch.
  struct Cell {
    uint32_t write_epoch, read_epoch;
    uint16_t write_thread, read_warp;
    Clock write_clock, read_clock;
    uint32_t read_lanes;
    bool several_warps_read, other_blocks_read;
  };
  struct Page {
    Cell cells[2048];
  };

  Cell& global_cell(uintptr_t address);
  const char* conflict(Cell& cell, bool is_write, unsigned self, bool is_shared) const;
  void note(Cell& cell, bool is_write, unsigned self) const;
  bool ordered(unsigned lane, Clock clock, unsigned self) const;
  bool reads_ordered(const Cell& cell, unsigned self) const;

  uintptr_t shared_ = 0;
  size_t shared_bytes_ = 0;
  std::vector<Cell> shared_cells_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_page_ = 0;
  Page* last_ = nullptr;
  uint32_t epoch_ = 0, first_of_launch_ = 0, first_of_block_ = 0;
  unsigned threads_ = 0;
  // What each thread knows of the clocks of its warp's lanes, which __syncwarp hands on.
  std::vector<Clock> clocks_;
};

}  // namespace mambablock_emulation
