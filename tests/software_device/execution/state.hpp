// What runs: the state of warps, blocks and clusters beyond instruction.hpp, and what the parts of the executor call of
// each other. One launch runs at a time.
#pragma once

#include <cstdio>
#include <map>

#include "instruction.hpp"

namespace soft {

// -- errors -------------------------------------------------------------------------------------------

// Ends the launch with a message that names kernel, block, thread, line and instruction.
[[noreturn]] void fault(const Warp& warp, const Inst& inst, int lane, const char* format, ...)
    __attribute__((format(printf, 4, 5)));
std::string describe(const Warp& warp, const Inst& inst, int lane);

// Some of CuPy's own kernels do what is undefined and hardware forgives, cupy_inclusive_batch_scan_kernel for one: they
// load shared memory that nobody wrote, and drop it; their lanes return before a barrier of the others of their warp.
inline bool is_lenient(const Function& function) { return function.name.compare(0, 5, "cupy_") == 0; }

// -- registers ----------------------------------------------------------------------------------------

inline int first_lane(u32 mask) { return __builtin_ctz(mask); }

// Register of `size` bytes (2, 4 or 8) of a lane.
inline u64 get_register(Warp& warp, u32 offset, int size, int lane) {
  if (size == 2) return R<u16>(warp, offset)[lane];
  if (size == 4) return R<u32>(warp, offset)[lane];
  return R<u64>(warp, offset)[lane];
}

inline void set_register(Warp& warp, u32 offset, int size, int lane, u64 value) {
  if (size == 2) {
    R<u16>(warp, offset)[lane] = static_cast<u16>(value);
  } else if (size == 4) {
    R<u32>(warp, offset)[lane] = static_cast<u32>(value);
  } else {
    R<u64>(warp, offset)[lane] = value;
  }
}

// A predicate register: one bit for each lane; only those of the running lanes change.
inline void set_predicate(Warp& warp, u32 offset, u32 bits) {
  u32* predicate = R<u32>(warp, offset);
  *predicate = (*predicate & ~warp.mask) | (bits & warp.mask);
}

// The address of an instruction (a, as, imm): a register of as bytes plus imm, or with as = 0 imm alone.
inline u64 address_of(Warp& warp, const Inst& inst, int lane) {
  if (inst.as == 0) return static_cast<u64>(inst.imm);
  return (inst.as == 4 ? R<u32>(warp, inst.a)[lane] : R<u64>(warp, inst.a)[lane]) + static_cast<u64>(inst.imm);
}

// -- order --------------------------------------------------------------------------------------------

// What a warp did, and when: its clock counts its releases (barriers, arrivals, fences). 0: nothing.
using Stamp = u32;
enum class StampKind : u32 { kPlain, kStrong, kAsync, kInFlight, kMBarrier };
constexpr u32 kClockBits = 20, kWarpBits = 9;

inline StampKind kind_of(Stamp stamp) { return static_cast<StampKind>(stamp >> (kClockBits + kWarpBits)); }
inline u32 warp_of(Stamp stamp) { return stamp >> kClockBits & ((1u << kWarpBits) - 1); }
inline u32 clock_of(Stamp stamp) { return stamp & ((1u << kClockBits) - 1); }
inline Stamp make_stamp(StampKind kind, u32 warp, u32 clock) {
  return static_cast<u32>(kind) << (kClockBits + kWarpBits) | warp << kClockBits | clock;
}

// By number of a warp in the cluster: it is known what that warp did up to this clock.
using VectorClock = std::vector<u32>;

// May the async proxy, on behalf of the warp, touch what was accessed then: with a proxy fence between?
bool async_ordered(const Warp& warp, Stamp earlier);
void release(Warp& warp, VectorClock& into);  // what the warp did and knows is known to whom acquires
void acquire(Warp& warp, const VectorClock& from);
void fence_async_proxy(Warp& warp);

// Lanes of one warp come after each other where both have been at a barrier, __syncwarp() for one, in between.
enum Lanes : u8 {
  kAllOfThem = 32,
  kNotKnown = 33
};  // where a lane is named: each lane, or lanes of which we know none
void order_lanes(Warp& warp, u32 lanes);
bool lanes_ordered(const Warp& warp, int lane, int earlier_lane, Stamp earlier);

// -- state --------------------------------------------------------------------------------------------

enum Wait : u8 { Ready, AtBarrier, AtCollective, AtCluster, AtRegisters, Polling };

struct AsyncCopies;  // bulk/bulk.hpp
struct BulkStores;   // bulk/bulk.hpp
struct WgmmaState;   // matrix/wgmma.hpp
struct Warpgroups;   // matrix/wgmma.hpp
struct MBarriers;    // bulk/bulk.hpp
struct SharedShadow;
struct GridOrder;  // execution/grid_order.hpp

struct WarpState {
  u32 number = 0;                 // in the cluster
  VectorClock known;              // its own entry is its clock
  std::vector<u32> proxy_fences;  // clocks
  u32 cluster_arrived = 0;        // lanes that have yet to wait for their arrival
  u32 cluster_phase[32] = {};     // of that arrival
  u32 cluster_waited = 0;         // phases of the cluster barrier that it has waited for
  u32 lanes_ordered = 0;          // clock of the last barrier of all lanes
  std::vector<u32> pairs;         // the same of pairs of lanes; empty where no barrier was of less than all
  bool queued = false;            // the scheduler has it in its list
  u32 registers = 0;              // per thread
  u32 setmaxnregs = 0;            // executed
  Stamp setmaxnreg[2] = {};       // the last two, by the lowest bit of their number
  std::unique_ptr<AsyncCopies> copies;
  std::unique_ptr<BulkStores> stores;
  std::unique_ptr<WgmmaState> wgmma;
  WarpState();
  ~WarpState();
};

// One of the 16 barriers of a block.
struct Barrier {
  u32 arrived = 0;         // threads, in whole warps where there is a count
  u32 expected = 0;        // the count of its instructions; 0: all threads
  std::vector<u32> lanes;  // that arrived, by warp
  VectorClock release;
  const Inst* inst = nullptr;  // of the first to arrive
  u32 count = 0, any = 0;      // barrier.red: lanes whose predicate holds, and lanes that brought one
};

struct BlockState {
  Barrier barriers[16];
  VectorClock fences;  // membar and fence order with one another
  std::unique_ptr<SharedShadow> shadow;
  std::unique_ptr<MBarriers> mbarriers;
  std::unique_ptr<Warpgroups> warpgroups;
  u32 free_registers = 0;  // per thread, summed over the warps that gave them back
  BlockState();
  ~BlockState();
};

struct ClusterState {
  VectorClock release, last_release;  // of its barrier
  std::vector<Warp*> runnable;
  std::vector<WarpState> warps;
  std::vector<BlockState> blocks;
  std::shared_ptr<GridOrder> grid;  // null: the kernel orders nothing between blocks
};

inline u32 warp_number(const Warp& warp) { return warp.state->number; }
inline Stamp stamp_of(const Warp& warp, StampKind kind = StampKind::kPlain) {
  return make_stamp(kind, warp.state->number, warp.state->known[warp.state->number]);
}
// Does the warp come after it?
inline bool ordered(const Warp& warp, Stamp earlier) {
  const u32 other = warp_of(earlier);
  return other == warp.state->number || warp.state->known[other] >= clock_of(earlier);
}

// -- parts of the executor ----------------------------------------------------------------------------

// warp.cpp
enum class Progress { kRan, kPolled, kStuck, kDone };  // kPolled: some lanes poll, the others wait
Progress run_warp(Warp& warp, u64 budget);
// block.cpp
void barrier_sync(Warp& warp, Group& group, const Inst& inst);
void barrier_arrive(Warp& warp, u32 lanes, const Inst& inst);
void complete_barriers(Block& block);  // those whose threads have all arrived
// cluster.cpp
void cluster_arrive(Warp& warp, u32 lanes, const Inst& inst);
bool cluster_wait(Warp& warp, u32 lanes, const Inst& inst);  // is it over?
void complete_cluster_barrier(Cluster& cluster);
// registers.cpp
void begin_registers(Block& block);
void request_registers(Warp& warp, const Inst& inst);
bool take_registers(Warp& warp, const Inst& inst);  // are there enough?
// scheduler.cpp
void run_cluster(Cluster& cluster, u64& random);
void wake(Warp& warp);
u64 next_random(u64& state);
// At the start of a cluster, and when lanes exit.
void begin_asynchronous(Cluster& cluster);
void check_exit(Warp& warp, u32 lanes, const Inst& inst);
std::string describe_mbarrier(Warp& warp, const Inst& inst, int lane);

}  // namespace soft
