// Begin and end of what runs asynchronously: nothing may be left in flight by a thread that exits.
#include <algorithm>

#include "bulk/bulk.hpp"
#include "matrix/wgmma.hpp"
#include "memory/shadow.hpp"

namespace soft {

WarpState::WarpState() : copies(new AsyncCopies), stores(new BulkStores), wgmma(new WgmmaState) {}
WarpState::~WarpState() = default;

BlockState::BlockState() : shadow(new SharedShadow), mbarriers(new MBarriers), warpgroups(new Warpgroups) {}
BlockState::~BlockState() = default;

void begin_asynchronous(Cluster& cluster) {
  for (WarpState& state : cluster.state->warps) {
    state.copies->copies.clear();
    state.stores->stores.clear();
    std::fill(state.copies->committed, state.copies->committed + 32, 0);
    std::fill(state.stores->committed, state.stores->committed + 32, 0);
    state.wgmma->clear();
  }
  for (BlockState& state : cluster.state->blocks) {
    state.mbarriers->by_offset.clear();
    state.warpgroups->groups.resize((cluster.blocks[0]->threads + 127) / 128);
    for (Warpgroup& group : state.warpgroups->groups) group.clear();
  }
}

static void check_copies(const Warp& warp, u32 lanes) {
  const AsyncCopies& queue = *warp.state->copies;
  for (const Copy& copy : queue.copies) {
    if (!(lanes >> copy.lane & 1)) continue;
    fault(warp, *copy.inst, copy.lane, "exited with a cp.async in flight that it never waited for, %s",
          copy.group < queue.committed[copy.lane] ? "committed" : "not committed");
  }
}

static void check_stores(const Warp& warp, u32 lanes) {
  const BulkStores& queue = *warp.state->stores;
  for (const BulkStore& store : queue.stores) {
    if (!(lanes >> store.lane & 1)) continue;
    fault(warp, *store.inst, store.lane, "exited with a bulk store that it %s",
          store.group < queue.committed[store.lane] ? "never waited for with cp.async.bulk.wait_group"
                                                    : "never committed");
  }
}

void check_exit(Warp& warp, u32 lanes, const Inst& inst) {
  check_copies(warp, lanes);
  check_stores(warp, lanes);
  check_wgmma_exit(warp);
  if (warp.state->cluster_arrived & lanes) {
    fault(warp, inst, first_lane(warp.state->cluster_arrived & lanes),
          "exited after a barrier.cluster.arrive without its barrier.cluster.wait");
  }
  const Block& block = *warp.block;
  if (block.live_threads != static_cast<u32>(__builtin_popcount(lanes))) return;
  for (const auto& [offset, barrier] : block.state->mbarriers->by_offset) {
    if (barrier.in_flight == 0) continue;
    fault(warp, inst, first_lane(lanes),
          "the block exited with %lld bytes of st.async or bulk loads in flight to its mbarrier at shared offset %u, "
          "never waited for",
          static_cast<long long>(barrier.in_flight), offset);
  }
}

}  // namespace soft
