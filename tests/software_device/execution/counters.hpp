// What a launch costs, counted: bytes, sectors, wavefronts, and how often each instruction ran.
#pragma once

#include "execution/state.hpp"

namespace soft {

struct Counters {
  u64 global_bytes_read, global_bytes_written, global_sectors_read, global_sectors_written, global_requests;
  u64 loads_by_size[5], stores_by_size[5];  // warp instructions of 1, 2, 4, 8 and 16 bytes per lane
  u64 shared_wavefronts, shared_wavefronts_ideal;
  u64 exps;                      // by lane
  u64 barriers, named_barriers;  // of a block: barrier 0, and the others
  u64 warp_collectives;          // shuffles, votes, matches and reductions
  u64 mma, wgmma, ldmatrix;      // by warp; stmatrix is among ldmatrix
  u64 cluster_barriers, mbarrier_waits, st_async_bytes, bulk_bytes;
  u64 warp_instructions, lane_instructions;
};

Counters& counters();
bool counting();  // bytes, sectors and wavefronts are counted only on demand: softCounting(1)

// The accesses of one warp instruction: its lanes and their addresses (in shared memory, offsets).
struct AccessGroup {
  u32 lanes = 0;
  u64 address[32];
  void add(int lane, u64 at) {
    lanes |= 1u << lane;
    address[lane] = at;
  }
};

void count_global(const AccessGroup& group, u32 bytes, bool write);
void count_global_copy(const AccessGroup& group, const u32* bytes);  // of each lane; cp.async
void count_shared(const AccessGroup& group, u32 bytes);

// How often the instruction at a pc ran.
struct Executed {
  u64 warps, lanes;
};
void begin_counting(const Function& function);
extern Executed* executed;              // by pc, of the kernel that runs
void end_counting(Function& function);  // adds them to the table of opcodes

}  // namespace soft
