// Release and acquire between the blocks of a launch, which run one after another here: a block that reads what another
// one wrote must have acquired it, by an atomic at the same address. PTX ISA, "Memory Consistency Model": "Release and
// Acquire Patterns", "Causality Order".
#include "execution/grid_order.hpp"

#include <algorithm>

namespace soft {

namespace {

void join(VectorClock& into, const VectorClock& from) {
  into.resize(std::max(into.size(), from.size()));
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void join(GridClock& into, const GridClock& from) {
  for (const auto& [cluster, clock] : from) join(into[cluster], clock);
}

// All that the warp did and comes after.
GridClock knowledge(const Warp& warp, const GridOrder& order) {
  GridClock all{{order.cluster, warp.state->known}};
  for (const GridOrder::Acquired& acquired : order.acquired) {
    if (ordered(warp, acquired.by)) join(all, acquired.what);
  }
  return all;
}

bool comes_after(const Warp& warp, const GridOrder& order, const GridOrder::Write& write) {
  for (const GridOrder::Acquired& acquired : order.acquired) {
    const auto found = acquired.what.find(write.cluster);
    if (found != acquired.what.end() && found->second[write.warp] >= write.clock && ordered(warp, acquired.by)) {
      return true;
    }
  }
  return false;
}

bool is_released(const GridOrder& order, const GridOrder::Write& write) {
  for (const auto& [address, clocks] : order.released) {
    const auto found = clocks.find(write.cluster);
    if (found != clocks.end() && found->second[write.warp] >= write.clock) return true;
  }
  return false;
}

void check(const Warp& warp, const Inst& inst, int lane, const GridOrder& order, u32 number, u64 address,
           const char* verb, bool read_only) {
  const GridOrder::Write& write = order.writes[number];
  if (!read_only && (write.cluster == order.cluster || comes_after(warp, order, write))) return;
  const char* const why = read_only                   ? ", as read-only memory"
                          : is_released(order, write) ? " and released, but this warp has not acquired it"
                                                      : " and has not released since";
  const Region& region = *warp.block->cached;
  fault(warp, inst, lane,
        "%s byte %llu of an allocation of %llu bytes, which block (%u, %u, %u) wrote in this launch%s", verb,
        static_cast<unsigned long long>(address - region.base), static_cast<unsigned long long>(region.size),
        write.block[0], write.block[1], write.block[2], why);
}

}  // namespace

void GridOrder::begin_cluster(size_t warp_count) {
  ++cluster;
  acquired.clear();
  warps.assign(warp_count, {});
}

void order_global(Warp& warp, const Inst& inst, int lane, u64 address, u32 bytes, bool write, bool read_only) {
  GridOrder& order = *grid_order(warp);
  u32 number = 0;
  if (write) {
    GridOrder::WarpOrder& mine = order.warps[warp_number(warp)];
    const u32 clock = clock_of(stamp_of(warp));
    const u32* const block = warp.block->ctaid;
    if (mine.write == 0 || order.writes[mine.write].clock != clock) {
      mine.write = static_cast<u32>(order.writes.size());
      order.writes.push_back({order.cluster, warp_number(warp), clock, {block[0], block[1], block[2]}});
    }
    number = mine.write;
  }
  for (u64 at = address; at < address + bytes; ++at) {
    if (!write && order.pages.count(at / GridOrder::kPage) == 0) continue;
    std::vector<u32>& page = order.pages[at / GridOrder::kPage];
    page.resize(GridOrder::kPage);
    u32& last = page[at % GridOrder::kPage];
    if (last != 0) check(warp, inst, lane, order, last, at, write ? "writes" : "reads", read_only);
    if (write) last = number;
  }
}

// A relaxed atomic releases what the last fence before it covers, and what it sees is acquired by the next one.
void order_atomic(Warp& warp, const Inst& inst, u64 address) {
  GridOrder& order = *grid_order(warp);
  if (!(inst.flag & kOfGrid)) return;
  GridOrder::WarpOrder& mine = order.warps[warp_number(warp)];
  GridClock& released = order.released[address];
  const GridClock before = released;
  if (inst.flag & kReleases) {
    join(released, knowledge(warp, order));
    VectorClock none;
    release(warp, none);  // what it does later is not known
  } else {
    join(released, mine.fenced);
  }
  if (inst.flag & kAcquires) {
    order.acquired.push_back({stamp_of(warp), before});
  } else {
    mine.seen.push_back(before);
  }
}

void order_fence(Warp& warp, const Inst& inst) {
  GridOrder* const order = grid_order(warp);
  if (!order) return;
  GridOrder::WarpOrder& mine = order->warps[warp_number(warp)];
  if (inst.flag & kAcquires) {
    for (const GridClock& seen : mine.seen) order->acquired.push_back({stamp_of(warp), seen});
    mine.seen.clear();
  }
  if (inst.flag & kReleases) mine.fenced = knowledge(warp, *order);
}

}  // namespace soft
