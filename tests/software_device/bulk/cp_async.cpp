// cp.async: bytes are taken and checked at once and land when their thread waits for them, as late as allowed; until
// then no warp may touch their destination. PTX ISA, "Non-bulk copy: cp.async", "cp.async.commit_group,
// cp.async.wait_group".
#include <algorithm>
#include <type_traits>

#include "bulk/bulk.hpp"
#include "execution/counters.hpp"
#include "execution/grid_order.hpp"
#include "execution/handlers.hpp"
#include "memory/shadow.hpp"

namespace soft {

void execute_cp_async(Warp& warp, const Inst& inst) {
  AsyncCopies& queue = *warp.state->copies;
  AccessGroup sources, destinations;
  u32 counts[32] = {};
  lanes(warp, [&](int lane) {
    const u32 wanted = inst.flag ? R<u32>(warp, inst.c)[lane] : inst.size;
    if (wanted > inst.size) fault(warp, inst, lane, "a cp.async of %d bytes", static_cast<int>(wanted));
    Copy copy = {};
    copy.inst = &inst;
    copy.lane = lane;
    copy.size = inst.size;
    copy.source_bytes = wanted;
    copy.group = queue.committed[lane];
    const u64 address = R<u64>(warp, inst.b)[lane] + static_cast<u64>(inst.source_imm);
    if (wanted != 0) {
      copy.source = locate_global(warp, inst, lane, address, wanted, inst.size, Use::kRead);
      if (grid_order(warp)) order_global(warp, inst, lane, address, wanted, false, false);
      memcpy(copy.bytes, copy.source, wanted);
      sources.add(lane, address);
      counts[lane] = wanted;
    }
    const u32 to = static_cast<u32>(address_of(warp, inst, lane));
    const SharedBytes at = locate_shared(warp, inst, lane, to, inst.size, inst.size);
    copy.offset = at.offset;
    begin_flight(warp, inst, lane, *at.block, at.offset, inst.size, flight_stamp(warp, kCpAsync), false);
    destinations.add(lane, at.offset);
    queue.copies.push_back(copy);
  });
  if (!counting()) return;
  count_global_copy(sources, counts);
  count_shared(destinations, inst.size);
}

void execute_cp_async_commit(Warp& warp, const Inst&) {
  lanes(warp, [&](int lane) { ++warp.state->copies->committed[lane]; });
}

void execute_cp_async_wait(Warp& warp, const Inst& inst) {
  AsyncCopies& queue = *warp.state->copies;
  Block& block = *warp.block;
  const auto lands = [&](const Copy& copy) {
    if (!(warp.mask >> copy.lane & 1)) return false;
    return inst.imm < 0 || copy.group + static_cast<u64>(inst.imm) < queue.committed[copy.lane];
  };
  for (const Copy& copy : queue.copies) {
    if (!lands(copy)) continue;
    if (memcmp(copy.bytes, copy.source ? copy.source : copy.bytes, copy.source_bytes) != 0) {
      fault(warp, *copy.inst, copy.lane, "the source of a cp.async was overwritten before it landed");
    }
    memcpy(block.smem.data() + copy.offset, copy.bytes, copy.size);
    end_flight(block, copy.offset, copy.size, stamp_of(warp), copy.lane);
  }
  queue.copies.erase(std::remove_if(queue.copies.begin(), queue.copies.end(), lands), queue.copies.end());
}

}  // namespace soft
