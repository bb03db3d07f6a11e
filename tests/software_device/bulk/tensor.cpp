// Boxes of tensors by the Tensor Memory Accelerator. All is checked when a box is asked for; a load lands when its
// mbarrier's phase ends, and a store reads its box when its thread waits for that. A load fills with zeros element by
// element, but a store writes the last 16 bytes of a row whole, wherever the tensor ends in them
// (https://github.com/triton-lang/triton/issues/11583, on an H100). PTX ISA, "cp.async.bulk.tensor", "Tensors".
#include <algorithm>
#include <type_traits>

#include "bulk/bulk.hpp"
#include "execution/counters.hpp"
#include "execution/handlers.hpp"
#include "memory/shadow.hpp"

namespace soft {

namespace {

constexpr u32 kChunk = 16;  // bytes that a swizzle moves, and that a store writes, together

TensorMap read_map(Warp& warp, const Inst& inst, int lane) {
  const u64 address = R<u64>(warp, inst.b)[lane];
  Inst generic = inst;
  generic.space = Generic;
  char bytes[128];
  if (address % 64 != 0) {
    fault(warp, inst, lane, "a tensor map misaligned: address %#llx", static_cast<unsigned long long>(address));
  }
  for (u32 half = 0; half < 128; half += 64) {
    memcpy(bytes + half, locate(warp, generic, lane, address + half, 64, Use::kRead), 64);
  }
  TensorMap map;
  memcpy(&map, bytes, sizeof map);
  if (map.rank < 1 || map.rank > 5 || map.item() == 0) fault(warp, inst, lane, "no tensor map is at that address");
  return map;
}

TensorMap map_at(Warp& warp, const Inst& inst, int lane) {
  const TensorMap map = read_map(warp, inst, lane);
  if (map.rank != inst.vec) {
    fault(warp, inst, lane, "a tensor map of rank %u where the instruction says %u", map.rank, inst.vec);
  }
  return map;
}

// Calls visit(address, offset, size) for the rows of a box as far as they lie in the tensor; `offset` is in the box.
template <class Visit>
void for_rows(const TensorMap& map, const s64 (&c)[5], Visit visit) {
  const auto inside = [&](int d, s64 i) { return c[d] + i >= 0 && c[d] + i <= static_cast<s64>(map.last[d]); };
  s64 begin = 0, end = map.box[0];
  while (begin < end && !inside(0, begin)) ++begin;
  while (begin < end && !inside(0, end - 1)) --end;
  if (begin == end) return;
  const s64 item = map.item();
  const u32 rows = map.box_bytes() / map.row_bytes();
  for (u32 row = 0; row < rows; ++row) {
    u32 rest = row;
    bool all_inside = true;
    u64 address = map.address + static_cast<u64>((c[0] + begin) * item);
    for (int d = 1; d < map.rank; ++d) {
      const s64 i = rest % map.box[d];
      rest /= map.box[d];
      all_inside &= inside(d, i);
      address += static_cast<u64>(c[d] + i) * map.strides[d - 1];
    }
    if (!all_inside) continue;
    visit(address, row * map.row_bytes() + static_cast<u32>(begin * item), static_cast<u32>((end - begin) * item));
  }
}

// Calls visit(address, offset, size) for the pieces of a box from `offset` on; `address` is in shared memory.
template <class Visit>
void for_pieces(const BulkBox& box, u32 offset, u32 size, Visit visit) {
  if (box.swizzle == 0) return visit(box.offset + offset, offset, size);
  const u32 mask = box.swizzle / 16 - 1;
  for (u32 end; size > 0; size -= end - offset, offset = end) {
    end = std::min(offset / kChunk * kChunk + kChunk, offset + size);
    const u32 address = box.offset + offset;
    visit(address ^ (address >> 7 & mask) << 4, offset, end - offset);
  }
}

BulkBox box_at(Warp& warp, const Inst& inst, int lane, const TensorMap& map) {
  const u32 alignment = map.span() == 0 ? 128 : 8 * map.span();
  const SharedBytes at =
      locate_shared(warp, inst, lane, static_cast<u32>(address_of(warp, inst, lane)), map.box_bytes(), 1);
  if (at.offset % alignment != 0) {
    fault(warp, inst, lane, "a box misaligned: at shared offset %u, but it takes a multiple of %u", at.offset,
          alignment);
  }
  return {&inst, lane, at.block, at.offset, map.box_bytes(), map.span(), {}};
}

// Sectors of the rows of a box; rows that follow each other may share one.
class SectorCount {
 public:
  void add(u64 address, u32 size) {
    const u64 first = address / 32, last = (address + size - 1) / 32;
    count_ += last - first + (first != last_);
    last_ = last;
  }
  u64 count() const { return count_; }

 private:
  u64 last_ = ~u64(0), count_ = 0;
};

void load(Warp& warp, const Inst& inst, int lane, const TensorMap& map, const s64 (&c)[5]) {
  BulkLoad load = {box_at(warp, inst, lane, map), std::vector<char>(map.box_bytes()), 0};
  SharedBytes at;
  MBarrier& barrier = async_mbarrier_at(warp, inst, lane, R<u32>(warp, inst.c)[lane], at);
  if (at.block != load.block) fault(warp, inst, lane, "a bulk load whose mbarrier is in another block");
  SectorCount sectors;
  for_rows(map, c, [&](u64 address, u32 offset, u32 size) {
    char* const source = locate_global(warp, inst, lane, address, size, map.item(), Use::kRead);
    memcpy(load.bytes.data() + offset, source, size);
    load.rows.push_back({source, offset, size});
    counters().global_bytes_read += size;
    sectors.add(address, size);
  });
  counters().global_sectors_read += sectors.count();
  counters().global_requests += !load.rows.empty();
  counters().bulk_bytes += load.size;
  load.stamp = stamp_of(warp, StampKind::kAsync);
  begin_flight(warp, inst, lane, *load.block, load.offset, load.size, flight_stamp(warp, kBulkLoad), true);
  release(warp, barrier.release);
  const u32 size = load.size;
  barrier.loads.push_back(std::move(load));
  expect_or_send(warp, inst, lane, barrier, 0, size);
}

void store(Warp& warp, const Inst& inst, int lane, const TensorMap& map, const s64 (&c)[5]) {
  BulkStores& queue = *warp.state->stores;
  BulkStore store = {box_at(warp, inst, lane, map), queue.committed[lane]};
  if (c[0] * static_cast<s64>(map.item()) % kChunk != 0) {
    fault(warp, inst, lane,
          "a bulk store from column %lld on: what it overwrites is known for multiples of 16 bytes only",
          static_cast<long long>(c[0]));
  }
  SectorCount sectors;
  for_rows(map, c, [&](u64 address, u32 offset, u32 size) {
    size = (size + kChunk - 1) / kChunk * kChunk;
    for_pieces(store, offset, size, [&](u32 from, u32, u32 bytes) {
      check_async_read(warp, inst, lane, *store.block, from, bytes, "a bulk store reads");
    });
    store.rows.push_back({locate_global(warp, inst, lane, address, size, map.item(), Use::kWrite), offset, size});
    counters().global_bytes_written += size;
    sectors.add(address, size);
  });
  counters().global_sectors_written += sectors.count();
  counters().global_requests += !store.rows.empty();
  queue.stores.push_back(std::move(store));
}

}  // namespace

void land(Warp& warp, const BulkLoad& load) {
  for (const BulkRow& row : load.rows) {
    if (memcmp(load.bytes.data() + row.offset, row.global, row.size) != 0) {
      fault(warp, *load.inst, load.lane, "the source of a bulk load was overwritten before it landed");
    }
  }
  for_pieces(load, 0, load.size, [&](u32 address, u32 offset, u32 size) {
    memcpy(load.block->smem.data() + address, load.bytes.data() + offset, size);
  });
  end_flight(*load.block, load.offset, load.size, load.stamp);
}

void execute_bulk_tensor(Warp& warp, const Inst& inst) {
  lanes(warp, [&](int lane) {
    const TensorMap map = map_at(warp, inst, lane);
    s64 c[5] = {};
    for (int d = 0; d < map.rank; ++d) c[d] = static_cast<s32>(R<u32>(warp, inst.x[d])[lane]);
    inst.flag ? load(warp, inst, lane, map, c) : store(warp, inst, lane, map, c);
  });
}

void execute_prefetch_tensormap(Warp& warp, const Inst& inst) {
  lanes(warp, [&](int lane) { read_map(warp, inst, lane); });
}

void execute_bulk_commit(Warp& warp, const Inst&) {
  lanes(warp, [&](int lane) { ++warp.state->stores->committed[lane]; });
}

void execute_bulk_wait(Warp& warp, const Inst& inst) {
  BulkStores& queue = *warp.state->stores;
  const auto ends = [&](const BulkStore& store) {
    return (warp.mask >> store.lane & 1) && store.group + static_cast<u64>(inst.imm) < queue.committed[store.lane];
  };
  for (const BulkStore& store : queue.stores) {
    if (!ends(store)) continue;
    for (const BulkRow& row : store.rows) {
      for_pieces(store, row.offset, row.size, [&](u32 address, u32 offset, u32 size) {
        check_async_read(warp, *store.inst, store.lane, *store.block, address, size, "a bulk store reads");
        memcpy(row.global + (offset - row.offset), store.block->smem.data() + address, size);
      });
      note_global_write(row.global, row.size);
    }
    record_async_read(warp, *store.block, store.offset, store.size);
  }
  queue.stores.erase(std::remove_if(queue.stores.begin(), queue.stores.end(), ends), queue.stores.end());
}

}  // namespace soft
