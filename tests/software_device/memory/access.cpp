// Addresses and their checks. PTX ISA, "State Spaces", "Generic Addressing", "mapa".
#include "memory/access.hpp"

#include <algorithm>

#include "execution/grid_order.hpp"
#include "memory/shadow.hpp"

namespace soft {

namespace {

const char* verb_of(Use use) { return writes(use) ? "write" : "read"; }

[[noreturn]] void fault_global(const Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, Use use) {
  const unsigned long long a = address;
  if (address < 65536) {
    fault(warp, inst, lane, "%s of %u bytes through a null pointer (address %#llx)", verb_of(use), bytes, a);
  }
  const std::string why = memory().explain(address, bytes);
  const bool once_there = why.find("freed") != std::string::npos;
  fault(warp, inst, lane, "%s%s of %u bytes at %#llx is %s", once_there ? "" : "out of bounds: ", verb_of(use), bytes,
        a, why.c_str());
}

// What CuPy's own kernels compute of such bytes counts as written.
void check_has_value(const Warp& warp, const Inst& inst, int lane, const Region& region, u64 address, u32 bytes) {
  if (region.has_value(address, bytes) || is_lenient(*warp.f)) return;
  u64 first = address;
  while (region.has_value(first, 1)) ++first;
  fault(warp, inst, lane, "reads byte %llu of an allocation of %llu bytes, which nobody has written",
        static_cast<unsigned long long>(first - region.base), static_cast<unsigned long long>(region.size));
}

Strength strength_of(Use use) {
  const bool strong = use == Use::kAtomic || use == Use::kStrongRead || use == Use::kStrongWrite;
  return strong ? Strength::kStrong : Strength::kWeak;
}

char* quick_access(const QuickAccess& access, int lane, u32 offset, u32 bytes, Use use) {
  if (use == Use::kAtomic && !access.read(lane, offset, bytes)) return nullptr;
  return writes(use) ? access.write(lane, offset, bytes) : access.read(lane, offset, bytes);
}

char* shared_memory(Warp& warp, const Inst& inst, int lane, u32 address, u32 bytes, Use use) {
  const QuickAccess quick(warp, strength_of(use));
  if (char* const at = quick_access(quick, lane_of(inst, lane), address, bytes, use)) return at;
  const SharedBytes at = locate_shared(warp, inst, lane, address, bytes, bytes);
  if (use == Use::kAtomic) {  // it reads what it updates
    check_shared_read(warp, inst, lane, *at.block, at.offset, bytes, Strength::kStrong);
  }
  if (writes(use)) {
    check_shared_write(warp, inst, lane, *at.block, at.offset, bytes, strength_of(use));
  } else {
    check_shared_read(warp, inst, lane, *at.block, at.offset, bytes, strength_of(use));
  }
  return at.bytes();
}

char* parameters(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, Use use) {
  const Block& block = *warp.block;
  if (address + bytes > block.param_size) {
    fault(warp, inst, lane, "%s of %u bytes of the kernel's parameters out of bounds: byte %llu of %u", verb_of(use),
          bytes, static_cast<unsigned long long>(address), block.param_size);
  }
  if (writes(use)) fault(warp, inst, lane, "writes the kernel's parameters");
  return block.params + address;
}

char* local_memory(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, Use use) {
  const u32 size = warp.f->local_bytes;
  if (address + bytes > size) {
    fault(warp, inst, lane, "%s of %u bytes of local memory out of bounds: byte %llu of %u", verb_of(use), bytes,
          static_cast<unsigned long long>(address), size);
  }
  char* const at = warp.local + static_cast<size_t>(lane) * size + address;
  const auto first = warp.block->local_written.begin() + (at - warp.block->local_store.data());
  if (writes(use)) {
    std::fill(first, first + bytes, true);
  } else if (const auto unknown = std::find(first, first + bytes, false); unknown != first + bytes) {
    if (is_lenient(*warp.f)) return at;
    fault(warp, inst, lane, "reads byte %llu of its local memory, which it has not written",
          static_cast<unsigned long long>(address) + static_cast<unsigned long long>(unknown - first));
  }
  return at;
}

}  // namespace

char* locate_global(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, u32 alignment, Use use) {
  if (__builtin_expect(address % alignment != 0, 0)) {
    fault(warp, inst, lane, "misaligned %s of %u bytes: address %#llx", verb_of(use), bytes,
          static_cast<unsigned long long>(address));
  }
  Block& block = *warp.block;
  const Region* region = block.cached;
  if (__builtin_expect(!region || address < region->base || address + bytes > region->base + region->size, 0)) {
    region = memory().find(address);
    if (!region || address + bytes > region->base + region->size) {
      fault_global(warp, inst, lane, address, bytes, use);
    }
    block.cached = region;
  }
  if (writes(use)) {
    if (region->constant) fault(warp, inst, lane, "writes constant memory");
    if (use != Use::kAtomic) return host(address);  // which reads what it updates
  }
  if (__builtin_expect(region->written != nullptr, 0)) check_has_value(warp, inst, lane, *region, address, bytes);
  return host(address);
}

void note_global_write(const char* at, u32 bytes) {
  const u64 here = reinterpret_cast<u64>(at);
  for (const u64 address : {here + kOffset, here}) {  // of the device, and pinned or managed
    if (const Region* region = memory().find(address)) return region->note_write(address, bytes);
  }
}

SharedBytes locate_shared(Warp& warp, const Inst& inst, int lane, u32 address, u32 bytes, u32 alignment) {
  const u32 number = address >> kRankShift, offset = address & kOffsetMask;
  Block* block = warp.block;
  if (number != 0) {
    const std::vector<Block*>& blocks = block->cl->blocks;
    if (number > blocks.size()) fault(warp, inst, lane, "a shared address %#x of no block of the cluster", address);
    block = blocks[number - 1];
    if (block->live_threads == 0) {
      fault(warp, inst, lane, "shared memory of block rank %u of the cluster, which has exited", block->rank);
    }
  }
  const u32 end = offset + bytes, size = static_cast<u32>(block->smem.size());
  const bool in_static = end <= static_end(*block->f);
  if (!in_static && (end > size || offset < block->f->dynamic_begin)) {
    fault(warp, inst, lane,
          "%u bytes of shared memory out of bounds: offset %u; static memory has %u bytes, dynamic has %u from %u on",
          bytes, offset, block->f->attributes.static_smem, block->l->smem, block->f->dynamic_begin);
  }
  if (offset % alignment != 0) {
    fault(warp, inst, lane, "%u bytes of shared memory misaligned: offset %u", bytes, offset);
  }
  return {block, offset};
}

char* locate(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, Use use) {
  int space = inst.space;
  if (space == Generic) {
    space = address >= kParam ? ParamS : address >= kLocal ? Local : address >= kShared ? Shared : Global;
    const u64 window = space == ParamS ? kParam : space == Local ? kLocal : space == Shared ? kShared : 0;
    address -= window;
  }
  if (space == Global) {
    char* const at = locate_global(warp, inst, lane, address, bytes, bytes, use);
    if (writes(use)) warp.block->cached->note_write(address, bytes);
    if (__builtin_expect(grid_order(warp) != nullptr, 0) && use != Use::kAtomic) {
      order_global(warp, inst, lane, address, bytes, writes(use), use == Use::kReadOnly);
    }
    return at;
  }
  if (space == Shared) return shared_memory(warp, inst, lane, static_cast<u32>(address), bytes, use);
  if (address % bytes != 0) {
    fault(warp, inst, lane, "misaligned %s of %u bytes: offset %llu", verb_of(use), bytes,
          static_cast<unsigned long long>(address));
  }
  if (space == ParamS) return parameters(warp, inst, lane, address, bytes, use);
  return local_memory(warp, inst, lane, address, bytes, use);
}

namespace {

// Do all lanes access the allocation of the access before, aligned? Without branches, for vector instructions.
bool all_in(const Region& region, const u64* address, u32 bytes) {
  if (region.size < bytes) return false;
  const u64 last = region.size - bytes;
  u64 outside = 0, misaligned = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const u64 offset = address[lane] - region.base;
    outside |= offset | (last - offset);  // the upper bit: beyond one end or the other
    misaligned |= address[lane];
  }
  return outside >> 63 == 0 && (misaligned & (bytes - 1)) == 0;
}

}  // namespace

void locate_lanes(Warp& warp, const Inst& inst, u32 bytes, Use use, const u64* address, char** at) {
  if (inst.space == Shared) {
    const QuickAccess access(warp, strength_of(use));
    lanes(warp, [&](int lane) {
      const u32 offset = static_cast<u32>(address[lane]);
      char* const found = quick_access(access, lane, offset, bytes, use);
      at[lane] = found ? found : locate(warp, inst, lane, offset, bytes, use);
    });
    return;
  }
  const Region* const region = warp.block->cached;
  if (inst.space == Global && region && !region->written && !grid_order(warp) && !(writes(use) && region->constant) &&
      warp.mask == ~0u && all_in(*region, address, bytes)) {
    for (int lane = 0; lane < 32; ++lane) at[lane] = host(address[lane]);
    return;
  }
  lanes(warp, [&](int lane) { at[lane] = locate(warp, inst, lane, address[lane], bytes, use); });
}

}  // namespace soft
