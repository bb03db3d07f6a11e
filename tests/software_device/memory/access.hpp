// Addresses: state spaces, windows of generic addresses, and the checks that every access passes.
#pragma once

#include "execution/state.hpp"

namespace soft {

// A shared address names a block of the cluster in its upper byte: its rank + 1; 0 is the block itself.
constexpr int kRankShift = 24;
constexpr u32 kOffsetMask = (1u << kRankShift) - 1;
inline u32 cluster_address(u32 rank, u32 offset) { return (rank + 1) << kRankShift | offset; }

enum class Use { kRead, kWrite, kAtomic, kStrongRead, kStrongWrite, kReadOnly };  // kReadOnly: .nc
inline bool writes(Use use) { return use == Use::kWrite || use == Use::kAtomic || use == Use::kStrongWrite; }

// Host address of `bytes` bytes at `address` in the instruction's space. Faults unless they are aligned, in bounds of a
// live allocation and, in shared memory, free of races.
char* locate(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, Use use);
// The same for all lanes of Warp::mask.
void locate_lanes(Warp& warp, const Inst& inst, u32 bytes, Use use, const u64* address, char** at);
// The same for global memory whatever the instruction's space, with an alignment of its own. A write is noted with
// note_global_write() when its bytes arrive.
char* locate_global(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, u32 alignment, Use use);
void note_global_write(const char* at, u32 bytes);

struct SharedBytes {
  Block* block;
  u32 offset;
  char* bytes() const { return block->smem.data() + offset; }
};

// `bytes` bytes of shared memory of the block, or of another one of the cluster: bounds and alignment only.
SharedBytes locate_shared(Warp& warp, const Inst& inst, int lane, u32 address, u32 bytes, u32 alignment);

}  // namespace soft
