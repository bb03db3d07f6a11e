// Copies and stores that are under way, and mbarriers.
#pragma once

#include "memory/access.hpp"

namespace soft {

// A cp.async that has not landed.
struct Copy {
  const Inst* inst;
  int lane;
  u32 offset, size, source_bytes, group;  // group: that its thread had committed before
  const char* source;
  char bytes[16];
};

struct AsyncCopies {
  std::vector<Copy> copies;  // oldest first
  u32 committed[32] = {};
};

// A run of elements of a box: where it is in global memory, and in the box before the swizzle.
struct BulkRow {
  char* global;
  u32 offset, size;
};

// A box in shared memory.
struct BulkBox {
  const Inst* inst;
  int lane;
  Block* block;
  u32 offset, size;
  u32 swizzle;                // what it permutes 16-byte chunks of, in bytes, or 0
  std::vector<BulkRow> rows;  // those inside of the tensor
};

struct BulkLoad : BulkBox {
  std::vector<char> bytes;
  Stamp stamp;  // who is known to have written it, once it has landed
};

struct BulkStore : BulkBox {
  u32 group;
};

struct BulkStores {
  std::vector<BulkStore> stores;
  u32 committed[32] = {};
};

void land(Warp& warp, const BulkLoad& load);  // bulk/tensor.cpp

// An st.async under way.
struct RemoteStore {
  u32 offset, size;
  char bytes[16];
  Stamp stamp;
};

struct MBarrier {
  u32 count, pending;
  s64 expected = 0, in_flight = 0;  // bytes of this phase
  u32 phase = 0;                    // completed ones
  bool fenced = false;              // for the async proxy: by fence.mbarrier_init, or fence.proxy.async
  u32 fence_phase = 0;              // of the cluster barrier, at that fence
  std::vector<RemoteStore> stores;
  std::vector<BulkLoad> loads;
  // What its arrivals release, and what other blocks send: a wait must be of the cluster to acquire that.
  VectorClock release, last_release, sent, last_sent;
};

struct MBarriers {
  std::map<u32, MBarrier> by_offset;
};

// The mbarrier at `address`, of the block or another one of the cluster.
MBarrier& mbarrier_at(Warp& warp, const Inst& inst, int lane, u32 address, SharedBytes& at);
// The same, which the async proxy must know.
MBarrier& async_mbarrier_at(Warp& warp, const Inst& inst, int lane, u32 address, SharedBytes& at);
// Bytes are on their way to the current phase, or known to be.
void expect_or_send(Warp& warp, const Inst& inst, int lane, MBarrier& barrier, s64 expected, s64 sent);

}  // namespace soft
