// Warpgroups: four warps that execute the same wgmma and setmaxnreg, each at its own time.
#pragma once

#include "state.hpp"

namespace emu {

// One of those instructions, as each warp of a warpgroup must execute it.
struct WarpgroupStep {
  const char* name;
  int number;                     // columns, or registers
  bool half;                      // elements are of float16, else of bfloat16
  uint32_t a, b, upper_a, upper;  // descriptors: lower words, then upper ones
  bool accumulate, by_columns;
  Site site;
};

// What tells two steps apart; null: nothing.
const char* difference(const WarpgroupStep& a, const WarpgroupStep& b);

constexpr uint32_t kWholeWarp = 0xffffffff;

// The place of a warp among those of the cluster.
inline size_t warp_number(const Warp& warp) {
  const Thread& first = warp.threads[0];
  return first.block->rank * first.block->warps.size() + first.index / 32;
}

// Faults unless the launch has the instruction `what`, of sm_90a, and all warps of the thread's warpgroup.
void check_warpgroup(const Thread& thread, const char* what, Site site);
// The warp's next step; faults where another warp of its warpgroup took a different one in its place.
void take_step(const Warp& warp, const WarpgroupStep& step);

}  // namespace emu
