// Cluster barriers, mbarriers, and the bytes that st_async and bulk loads complete on them.
#include <cstdio>

#include "state.hpp"

namespace emu {

void claim(Thread& thread, Block& target, uint32_t offset, int size, const Stamp& stamp, Site site);

namespace {

void check_rank(const Thread& thread, int cta_rank, Site site) {
  if (cta_rank < 0 || cta_rank >= machine.cluster_blocks) {
    fault(thread, site, "block %d of a cluster of %d", cta_rank, machine.cluster_blocks);
  }
}

// The mbarrier at `offset` of `block`.
MBarrier& mbarrier_at(Thread& thread, Block& block, uint32_t offset, Site site) {
  const Stamp& stamp = machine.stamps[block.shadow[offset].writer];
  if (stamp.kind != Stamp::kMBarrier || machine.mbarriers[stamp.object].offset != offset) {
    fault(thread, site, "mbarrier at shared offset %u used before mbarrier_init", offset);
  }
  return machine.mbarriers[stamp.object];
}

// fence_mbarrier_init releases by itself: any cluster barrier after it will do, also one with relaxed arrivals.
bool known_to_cluster(const Thread& thread, const MBarrier& bar) {
  return bar.fenced && bar.fence.cluster_count < thread.cluster_waits;
}

// The caller's own mbarrier, initialised before now as far as the caller can know.
MBarrier& local_mbarrier(Thread& thread, void* mbarrier, Site site) {
  MBarrier& bar = mbarrier_at(thread, *thread.block, smem_offset(thread, mbarrier, 8, site), site);
  if (!ordered(thread, bar.init) && !known_to_cluster(thread, bar))
    fault(thread, site, "mbarrier used with no barrier since its mbarrier_init");
  return bar;
}

// How many phases are complete once a wait of `thread` for `parity` returns.
uint32_t phases_after(const Thread& thread, MBarrier& bar, int parity, Site site) {
  bar.waited.resize(machine.block_threads);
  const int64_t last = bar.waited[thread.index].phases;
  // The first wait is for phase 0, or at once through for the one before it.
  const int64_t target = last >= 0 ? last + 1 : parity == 1 ? 0 : 1;
  if (parity != (target + 1) % 2) {
    fault(thread, site, "mbarrier_wait for parity %d, but after its last wait the thread's next phase is of parity %d",
          parity, 1 - parity);
  }
  return static_cast<uint32_t>(target);
}

void check_not_late(const Thread& thread, const MBarrier& bar, uint32_t target, Site site) {
  if (bar.phase <= target) return;
  fault(thread, site,
        "mbarrier_wait comes too late: the mbarrier has completed %u phases, and the thread waits for the %s: it "
        "would hang, or pass by accident",
        bar.phase, target == 0 ? "one before the first" : "one before the last or an earlier one");
}

// It was not late this time, and never is where an arrival or a bulk load of the phase comes after the thread's last
// wait: in the order of memory; or of a collective of its warp, which orders no memory but comes after the wait for all
// lanes; or as it comes after a wait for a bulk load that the thread has begun since.
void check_never_late(const Thread& thread, const MBarrier& bar, uint32_t target, Site site) {
  const Waited& last = bar.waited[thread.index];
  if (target == 0 || last.phases < 0 || last.epoch < bar.last_epoch) return;
  for (const std::vector<uint32_t>* row : {&bar.last_release, &bar.last_sent}) {
    if (row->empty()) continue;
    const uint32_t* known = row->data();
    if (known[thread.index] > last.clock) return;
    if (last.meeting < thread.warp->meetings.size()) {
      const uint32_t* met = thread.warp->meetings[last.meeting].clock;
      for (int lane = 0; lane < thread.warp->size; ++lane) {
        if (known[thread.warp->threads[lane].index] > met[lane]) return;
      }
    }
    for (size_t i = last.loads; i < thread.loads.size(); ++i) {
      for (const Stamp& passed : machine.async_phases[thread.loads[i]].passed) {
        if (passed.rank == bar.rank && known[passed.thread] > passed.clock) return;
      }
    }
  }
  fault(thread, site,
        "mbarrier_wait may come too late: nothing of the mbarrier's phase %u comes after the thread's wait for the "
        "phase before it",
        target);
}

}  // namespace

// The caller's own mbarrier, which the async proxy may know.
MBarrier& async_mbarrier(Thread& thread, void* mbarrier, Site site) {
  MBarrier& bar = local_mbarrier(thread, mbarrier, site);
  if (!bar.fenced) fault(thread, site, "an mbarrier for a bulk load with no fence_mbarrier_init since its init");
  if (!ordered(thread, bar.fence) && !known_to_cluster(thread, bar)) {
    fault(thread, site, "an mbarrier for a bulk load with no barrier since its fence_mbarrier_init");
  }
  return bar;
}

// Number of the AsyncPhase that `what` sends bytes to.
int async_phase(MBarrier& bar, const char* what) {
  if (bar.async < 0) {
    bar.async = static_cast<int>(machine.async_phases.size());
    machine.async_phases.push_back({static_cast<int>(&bar - machine.mbarriers.data()), what, false, false, {}});
  }
  return bar.async;
}

// `bytes` more are on their way to the current phase, or known to be.
void expect_or_send(const Thread& thread, MBarrier& bar, int64_t expected, int64_t sent, Site site) {
  bar.tx += expected;
  bar.in_flight += sent;
  if (bar.tx >= 1 << 20) {
    fault(thread, site, "a phase of an mbarrier expects %lld bytes; the limit is 2^20 - 1",
          static_cast<long long>(bar.tx));
  }
  if (bar.pending == 0 && bar.in_flight > bar.tx) {
    fault(thread, site, "mbarrier gets %lld bytes in a phase that expects %lld", static_cast<long long>(bar.in_flight),
          static_cast<long long>(bar.tx));
  }
  settle_mbarrier(bar);
}

void describe_missing(int mbarrier, char* text, size_t size) {
  const MBarrier& bar = machine.mbarriers[mbarrier];
  const int64_t bytes = bar.in_flight < bar.tx ? bar.tx - bar.in_flight : 0;
  snprintf(text, size, " (of the mbarrier at shared offset %u %d of %d arrivals and %lld of %lld bytes are missing)",
           bar.offset, bar.pending, bar.count, static_cast<long long>(bytes), static_cast<long long>(bar.tx));
}

// -- cluster barrier ----------------------------------------------------------------------------------

int cluster_rank(Site site) {
  check_arch(running(), 900, "cluster_ctarank", site);
  return running().block->rank;
}

void cluster_arrive(bool relaxed, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "cluster_arrive", site);
  if (thread.cluster_arrives != thread.cluster_waits) fault(thread, site, "two cluster_arrives without a cluster_wait");
  if (thread.cluster_arrives >= machine.cluster_min_exited) {
    fault(thread, site, "cluster_arrive, but a thread of the cluster has exited without it");
  }
  for (int lane = 0; lane < thread.warp->size; ++lane) {
    const Thread& other = thread.warp->threads[lane];
    if (other.cluster_arrives <= thread.cluster_arrives || other.relaxed[thread.cluster_arrives] == relaxed) continue;
    fault(thread, site, "cluster_arrive of some lanes of a warp and cluster_arrive_relaxed of others");
  }
  ++thread.cluster_arrives;
  thread.relaxed.push_back(relaxed);
  advance(thread);
  if (thread.cluster_arrives > machine.cluster_max_arrives) machine.cluster_max_arrives = thread.cluster_arrives;
  if (++machine.cluster_arrived < static_cast<uint32_t>(machine.total_threads())) return;
  machine.cluster_arrived = 0;
  ++machine.cluster_phases;
  ++machine.counters.cluster_barriers;
  wake_all(Thread::kClusterBarrier, 0, machine.threads.data(), machine.total_threads());
}

void cluster_wait(Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "cluster_wait", site);
  if (thread.cluster_arrives == thread.cluster_waits) fault(thread, site, "cluster_wait without a cluster_arrive");
  if (machine.cluster_phases < thread.cluster_arrives) wait(thread, Thread::kClusterBarrier, 0, site);
  ++thread.cluster_waits;
  advance(thread);
}

unsigned int cluster_address(const void* smem_ptr, int cta_rank, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "mapa", site);
  check_rank(thread, cta_rank, site);
  return static_cast<unsigned int>(cta_rank) << 24 | smem_offset(thread, smem_ptr, 1, site);
}

// -- mbarrier -----------------------------------------------------------------------------------------

void mbarrier_init(void* mbarrier, int arrivals, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "mbarrier_init", site);
  const uint32_t offset = smem_offset(thread, mbarrier, 8, site);
  Block& block = *thread.block;
  if (arrivals < 1 || arrivals >= 1 << 20) fault(thread, site, "mbarrier_init with %d arrivals", arrivals);
  if (machine.stamps[block.shadow[offset].writer].kind == Stamp::kMBarrier) {
    fault(thread, site, "mbarrier_init of a live mbarrier (shared offset %u)", offset);
  }
  MBarrier bar = {};
  bar.rank = block.rank;
  bar.offset = offset;
  bar.count = bar.pending = arrivals;
  bar.init = make_stamp(thread, Stamp::kPlain);
  bar.async = bar.last_async = -1;
  Stamp stamp = make_stamp(thread, Stamp::kMBarrier);
  stamp.object = static_cast<int>(machine.mbarriers.size());
  claim(thread, block, offset, 8, stamp, site);
  machine.mbarriers.push_back(bar);
}

void fence_mbarrier_init(Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "fence_mbarrier_init", site);
  for (MBarrier& bar : machine.mbarriers) {
    if (bar.fenced || bar.rank != thread.block->rank || bar.init.thread != thread.index) continue;
    bar.fenced = true;
    bar.fence = make_stamp(thread, Stamp::kPlain);
  }
}

// Lands what is in flight and completes the phase, once a thread waits for it and nothing is missing: as late as
// allowed.
void settle_mbarrier(MBarrier& bar) {
  if (bar.waiters == 0 || bar.pending > 0 || bar.in_flight != bar.tx) return;
  Block& block = machine.blocks[bar.rank];
  for (const Flight& flight : bar.flights) memcpy(block.arena_start + flight.offset, flight.bytes, flight.size);
  for (const BulkLoad& load : bar.loads) land(load, block);
  bar.flights.clear();
  bar.loads.clear();
  if (bar.async >= 0) machine.async_phases[bar.async].landed = true;
  bar.last_async = bar.async;
  bar.async = -1;
  bar.last_release.swap(bar.release);
  bar.release.clear();
  bar.last_sent.swap(bar.sent);
  bar.sent.clear();
  bar.last_epoch = bar.epoch;
  bar.tx = bar.in_flight = 0;
  bar.pending = bar.count;
  ++bar.phase;
  bar.waiters = 0;
  wake_all(Thread::kMBarrier, static_cast<int>(&bar - machine.mbarriers.data()), block.threads, machine.block_threads);
}

void mbarrier_arrive(void* mbarrier, int bytes, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "mbarrier_arrive", site);
  MBarrier& bar = local_mbarrier(thread, mbarrier, site);
  if (bytes < 0 || bytes >= 1 << 20) fault(thread, site, "mbarrier_arrive_expect_tx of %d bytes", bytes);
  if (bar.pending == 0) fault(thread, site, "more arrivals at an mbarrier than the %d of its phase", bar.count);
  --bar.pending;
  release_into(bar.release, thread);
  bar.epoch = thread.block->epoch;
  expect_or_send(thread, bar, bytes, 0, site);
}

void mbarrier_wait(void* mbarrier, int parity, bool of_cluster, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "mbarrier_wait", site);
  if (parity != 0 && parity != 1) fault(thread, site, "mbarrier_wait for parity %d", parity);
  const int index = static_cast<int>(&local_mbarrier(thread, mbarrier, site) - machine.mbarriers.data());
  const uint32_t target = phases_after(thread, machine.mbarriers[index], parity, site);
  // NOTE: other threads may add mbarriers while this one waits, so no reference is held over the wait.
  if (machine.mbarriers[index].phase < target) {
    ++machine.mbarriers[index].waiters;
    settle_mbarrier(machine.mbarriers[index]);
    if (machine.mbarriers[index].phase < target) wait(thread, Thread::kMBarrier, index, site);
  }
  MBarrier& bar = machine.mbarriers[index];
  check_not_late(thread, bar, target, site);
  check_never_late(thread, bar, target, site);
  bar.waited[thread.index] = {target, thread.clock, thread.block->epoch, thread.warp->meetings.size(),
                              thread.loads.size()};
  thread.warp->waited = true;
  ++machine.counters.mbarrier_waits;
  acquire_from(bar.last_release, thread);
  if (bar.last_async < 0 || target == 0) return;
  AsyncPhase& phase = machine.async_phases[bar.last_async];
  if (phase.from_others && !of_cluster) {
    fault(thread, site, "mbarrier_wait for what other blocks of the cluster send: it takes mbarrier_wait_cluster");
  }
  phase.passed.push_back(make_stamp(thread, Stamp::kPlain));
}

void st_async(void* smem_ptr, const void* value, int size, void* mbarrier, int cta_rank, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "st_async", site);
  check_rank(thread, cta_rank, site);
  const uint32_t offset = smem_offset(thread, smem_ptr, size, site);
  const uint32_t bar_offset = smem_offset(thread, mbarrier, 8, site);
  Block& target = machine.blocks[cta_rank];
  if (target.exited == machine.block_threads)
    fault(thread, site, "st_async to block %d of the cluster: block exited", cta_rank);
  MBarrier& bar = mbarrier_at(thread, target, bar_offset, site);
  if (bar.init.cluster_count >= thread.cluster_waits) {
    fault(thread, site, "st_async to an mbarrier with no cluster barrier since its mbarrier_init");
  }
  if (!known_to_cluster(thread, bar)) {
    fault(thread, site, "st_async to an mbarrier with no fence_mbarrier_init before the cluster barrier");
  }
  Stamp stamp = make_stamp(thread, Stamp::kAsync);
  stamp.object = async_phase(bar, "an st_async");
  machine.async_phases[stamp.object].from_others |= cta_rank != thread.block->rank;
  claim(thread, target, offset, size, stamp, site);
  Flight flight = {offset, static_cast<uint8_t>(size), {}};
  memcpy(flight.bytes, value, size);
  bar.flights.push_back(flight);
  machine.counters.st_async_bytes += size;
  expect_or_send(thread, bar, 0, size, site);
}

void check_block_exit(Thread& last) {
  const Block& block = *last.block;
  for (const MBarrier& bar : machine.mbarriers) {
    if (bar.rank != block.rank || bar.in_flight == 0) continue;
    fault(last, bar.loads.empty() ? Site{nullptr, 0} : bar.loads[0].site,
          "block exited with %lld bytes of st_async or bulk loads in flight to it, never waited for",
          static_cast<long long>(bar.in_flight));
  }
}

}  // namespace emu
