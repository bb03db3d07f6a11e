// What comes after what between the blocks of one launch, in global memory.
#pragma once

#include <unordered_map>

#include "execution/state.hpp"

namespace soft {

// The order of atomics and fences beyond a block, in Inst::flag.
enum GridOrderFlag : u8 { kAcquires = 1, kReleases = 2, kOfGrid = 4 };

// By cluster, in the order in which they run: what its warps did up to these clocks.
using GridClock = std::map<u32, VectorClock>;

// Of a launch whose kernel has such a fence or atomic.
struct GridOrder {
  struct Write {
    u32 cluster, warp, clock;
    u32 block[3];
  };
  struct Acquired {
    Stamp by;  // a warp of the cluster that runs
    GridClock what;
  };
  struct WarpOrder {
    u32 write = 0;                // its last one, in `writes`
    GridClock fenced;             // what its last fence has released, once an atomic is seen
    std::vector<GridClock> seen;  // by atomics that acquire nothing before the next fence
  };
  static constexpr u64 kPage = 4096;

  u32 cluster = 0;
  std::vector<Write> writes{1};
  std::unordered_map<u64, std::vector<u32>> pages;  // of each byte, the number of the last write, or 0
  std::unordered_map<u64, GridClock> released;      // by address of an atomic
  std::vector<Acquired> acquired;
  std::vector<WarpOrder> warps;

  void begin_cluster(size_t warp_count);
};

inline GridOrder* grid_order(const Warp& warp) { return warp.block->cl->state->grid.get(); }

// An access to global memory by ordinary instructions or cp.async. Null where the kernel orders nothing.
void order_global(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, bool write, bool read_only);
void order_atomic(Warp& warp, const Inst& inst, u64 address);
void order_fence(Warp& warp, const Inst& inst);

}  // namespace soft
