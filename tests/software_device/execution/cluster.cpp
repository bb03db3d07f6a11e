// Clusters of blocks: their barrier, and shared memory of other blocks. PTX ISA, "barrier.cluster", "mapa".
#include <algorithm>

#include "execution/counters.hpp"
#include "execution/handlers.hpp"

namespace soft {

void complete_cluster_barrier(Cluster& cluster) {
  if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
  cluster.arrived = 0;
  ++cluster.phase;
  ++cluster.changes;
  ++counters().cluster_barriers;
  cluster.state->last_release.swap(cluster.state->release);
  cluster.state->release.clear();
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) {
      for (int x = 0; x < warp.ng; ++x) {
        if (warp.g[x].wait == AtCluster) wake(warp);
      }
    }
  }
}

// inst.flag: .relaxed, which releases nothing.
void cluster_arrive(Warp& warp, u32 lanes, const Inst& inst) {
  Cluster& cluster = *warp.block->cl;
  WarpState& state = *warp.state;
  if (state.cluster_arrived & lanes) {
    fault(warp, inst, first_lane(state.cluster_arrived & lanes),
          "two barrier.cluster.arrive without a barrier.cluster.wait between");
  }
  state.cluster_arrived |= lanes;
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) state.cluster_phase[first_lane(rest)] = cluster.phase;
  if (!inst.flag) release(warp, cluster.state->release);
  cluster.arrived += static_cast<u32>(__builtin_popcount(lanes));
  ++cluster.changes;
  complete_cluster_barrier(cluster);
}

bool cluster_wait(Warp& warp, u32 lanes, const Inst& inst) {
  WarpState& state = *warp.state;
  const Cluster& cluster = *warp.block->cl;
  if (lanes & ~state.cluster_arrived) {
    fault(warp, inst, first_lane(lanes & ~state.cluster_arrived),
          "barrier.cluster.wait without a barrier.cluster.arrive");
  }
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
    if (cluster.phase <= state.cluster_phase[first_lane(rest)]) return false;
  }
  state.cluster_arrived &= ~lanes;
  state.cluster_waited = std::max(state.cluster_waited, state.cluster_phase[first_lane(lanes)] + 1);
  acquire(warp, cluster.state->last_release);
  order_lanes(warp, lanes);
  return true;
}

void execute_mapa(Warp& warp, const Inst& inst) {
  const size_t blocks = warp.block->cl->blocks.size();
  lanes(warp, [&](int lane) {
    const u32 address = R<u32>(warp, inst.a)[lane], rank = R<u32>(warp, inst.b)[lane];
    if (rank >= blocks) fault(warp, inst, lane, "block %u of a cluster of %zu", rank, blocks);
    R<u32>(warp, inst.d)[lane] = cluster_address(rank, address & kOffsetMask);
  });
}

}  // namespace soft
