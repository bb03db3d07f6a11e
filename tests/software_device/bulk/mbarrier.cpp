// mbarriers: their phases, and the bytes that st.async and bulk loads complete on them. What is in flight lands, and
// the phase ends, when a thread asks for it or the next phase begins: as late as allowed. PTX ISA, "mbarrier",
// "st.async".
#include <cstdio>

#include "bulk/bulk.hpp"
#include "execution/counters.hpp"
#include "execution/handlers.hpp"
#include "memory/shadow.hpp"

namespace soft {

namespace {

constexpr s64 kMaxBytes = (1 << 20) - 1;
constexpr u32 kMaxCount = (1 << 20) - 1;

u32 address_of_mbarrier(Warp& warp, const Inst& inst, int lane) {
  return static_cast<u32>(address_of(warp, inst, lane));
}

bool can_complete(const MBarrier& barrier) { return barrier.pending == 0 && barrier.in_flight == barrier.expected; }

void complete_phase(Warp& warp, Block& block, MBarrier& barrier) {
  for (const RemoteStore& store : barrier.stores) {
    memcpy(block.smem.data() + store.offset, store.bytes, store.size);
    end_flight(block, store.offset, store.size, store.stamp);
  }
  for (const BulkLoad& load : barrier.loads) land(warp, load);
  barrier.stores.clear();
  barrier.loads.clear();
  barrier.last_release.swap(barrier.release);
  barrier.release.clear();
  barrier.last_sent.swap(barrier.sent);
  barrier.sent.clear();
  barrier.expected = barrier.in_flight = 0;
  barrier.pending = barrier.count;
  ++barrier.phase;
  ++block.cl->changes;
}

void arrive(Warp& warp, const Inst& inst, int lane, s64 bytes) {
  SharedBytes at;
  MBarrier& barrier = mbarrier_at(warp, inst, lane, address_of_mbarrier(warp, inst, lane), at);
  if (bytes < 0 || bytes > kMaxBytes)
    fault(warp, inst, lane, "mbarrier.arrive.expect_tx of %lld bytes", static_cast<long long>(bytes));
  if (can_complete(barrier)) complete_phase(warp, *at.block, barrier);
  if (barrier.pending == 0) {
    fault(warp, inst, lane, "more arrivals at an mbarrier than the %u of its phase", barrier.count);
  }
  --barrier.pending;
  if (inst.order != Order::kRelaxed) release(warp, barrier.release);
  expect_or_send(warp, inst, lane, barrier, bytes, 0);
}

}  // namespace

MBarrier& mbarrier_at(Warp& warp, const Inst& inst, int lane, u32 address, SharedBytes& at) {
  at = locate_shared(warp, inst, lane, address, 8, 8);
  const auto found = at.block->state->mbarriers->by_offset.find(at.offset);
  if (found == at.block->state->mbarriers->by_offset.end()) {
    fault(warp, inst, lane, "mbarrier at shared offset %u used before mbarrier.init", at.offset);
  }
  const Stamp init = at.block->state->shadow->words[at.offset / 4].writer;
  const Stamp made = make_stamp(StampKind::kPlain, warp_of(init), clock_of(init));
  // fence.mbarrier_init releases by itself: any cluster barrier after it will do, also one with relaxed arrivals.
  const MBarrier& barrier = found->second;
  const bool known_to_cluster = barrier.fenced && warp.state->cluster_waited > barrier.fence_phase;
  if (!ordered(warp, made) && !known_to_cluster) {
    fault(warp, inst, lane, "mbarrier at shared offset %u used with no barrier since its mbarrier.init", at.offset);
  }
  return found->second;
}

MBarrier& async_mbarrier_at(Warp& warp, const Inst& inst, int lane, u32 address, SharedBytes& at) {
  MBarrier& barrier = mbarrier_at(warp, inst, lane, address, at);
  if (!barrier.fenced) {
    fault(warp, inst, lane, "an mbarrier for the async proxy with no fence.mbarrier_init since its init");
  }
  return barrier;
}

// Both fences make the warp's own mbarriers known to the async proxy.
void fence_mbarriers(Warp& warp) {
  Block& block = *warp.block;
  for (auto& [offset, barrier] : block.state->mbarriers->by_offset) {
    const Stamp init = block.state->shadow->words[offset / 4].writer;
    if (barrier.fenced || warp_of(init) != warp_number(warp)) continue;
    barrier.fenced = true;
    barrier.fence_phase = block.cl->phase;
  }
}

void execute_fence_mbarrier_init(Warp& warp, const Inst&) { fence_mbarriers(warp); }

void expect_or_send(Warp& warp, const Inst& inst, int lane, MBarrier& barrier, s64 expected, s64 sent) {
  barrier.expected += expected;
  barrier.in_flight += sent;
  if (barrier.expected > kMaxBytes) {
    fault(warp, inst, lane, "a phase of an mbarrier expects %lld bytes; the limit is 2^20 - 1",
          static_cast<long long>(barrier.expected));
  }
  if (barrier.pending == 0 && barrier.in_flight > barrier.expected) {
    fault(warp, inst, lane, "mbarrier gets %lld bytes in a phase that expects %lld",
          static_cast<long long>(barrier.in_flight), static_cast<long long>(barrier.expected));
  }
  ++warp.block->cl->changes;
}

std::string describe_mbarrier(Warp& warp, const Inst& inst, int lane) {
  if (inst.fn != execute_mbarrier_wait) return "";
  const u32 offset = address_of_mbarrier(warp, inst, lane) & kOffsetMask;
  const auto found = warp.block->state->mbarriers->by_offset.find(offset);
  if (found == warp.block->state->mbarriers->by_offset.end()) return "";
  const MBarrier& barrier = found->second;
  const s64 bytes = barrier.in_flight < barrier.expected ? barrier.expected - barrier.in_flight : 0;
  char text[160];
  snprintf(text, sizeof text,
           " (of the mbarrier at shared offset %u %u of %u arrivals and %lld of %lld bytes are missing)", offset,
           barrier.pending, barrier.count, static_cast<long long>(bytes), static_cast<long long>(barrier.expected));
  return text;
}

void execute_mbarrier_init(Warp& warp, const Inst& inst) {
  lanes(warp, [&](int lane) {
    const SharedBytes at = locate_shared(warp, inst, lane, address_of_mbarrier(warp, inst, lane), 8, 8);
    const u32 count = R<u32>(warp, inst.b)[lane];
    if (count < 1 || count > kMaxCount) fault(warp, inst, lane, "mbarrier.init with %u arrivals", count);
    std::map<u32, MBarrier>& mbarriers = at.block->state->mbarriers->by_offset;
    if (mbarriers.count(at.offset)) {
      fault(warp, inst, lane, "mbarrier.init of a live mbarrier (shared offset %u)", at.offset);
    }
    make_mbarrier(warp, inst, lane, *at.block, at.offset);
    MBarrier& barrier = mbarriers[at.offset];
    barrier.count = barrier.pending = count;
  });
}

void execute_mbarrier_inval(Warp& warp, const Inst& inst) {
  lanes(warp, [&](int lane) {
    SharedBytes at;
    const MBarrier& barrier = mbarrier_at(warp, inst, lane, address_of_mbarrier(warp, inst, lane), at);
    if (barrier.in_flight != 0) {
      fault(warp, inst, lane, "mbarrier.inval with %lld bytes in flight", static_cast<long long>(barrier.in_flight));
    }
    at.block->state->mbarriers->by_offset.erase(at.offset);
    unmake_mbarrier(*at.block, at.offset);
  });
}

void execute_mbarrier_arrive(Warp& warp, const Inst& inst) {
  lanes(warp,
        [&](int lane) { arrive(warp, inst, lane, inst.flag ? static_cast<s32>(R<u32>(warp, inst.b)[lane]) : 0); });
}

void execute_mbarrier_expect(Warp& warp, const Inst& inst) {
  lanes(warp, [&](int lane) {
    SharedBytes at;
    MBarrier& barrier = mbarrier_at(warp, inst, lane, address_of_mbarrier(warp, inst, lane), at);
    expect_or_send(warp, inst, lane, barrier, static_cast<s32>(R<u32>(warp, inst.b)[lane]), 0);
  });
}

// Has the phase of this parity ended? True as long as the next one has not.
void execute_mbarrier_wait(Warp& warp, const Inst& inst) {
  u32 done = 0;
  lanes(warp, [&](int lane) {
    SharedBytes at;
    MBarrier& barrier = mbarrier_at(warp, inst, lane, address_of_mbarrier(warp, inst, lane), at);
    const u32 parity = R<u32>(warp, inst.b)[lane];
    if (parity > 1) fault(warp, inst, lane, "an mbarrier wait for parity %u", parity);
    if ((barrier.phase & 1) == parity && can_complete(barrier)) complete_phase(warp, *at.block, barrier);
    if ((barrier.phase & 1) == parity) return;
    done |= 1u << lane;
    ++counters().mbarrier_waits;
    if (inst.order == Order::kRelaxed) return;
    acquire(warp, barrier.last_release);
    if (inst.order == Order::kCluster) acquire(warp, barrier.last_sent);
    order_lanes(warp, warp.live);  // which of them arrived there, an mbarrier does not know
  });
  set_predicate(warp, inst.d, done);
  warp.yield = done != warp.mask;
}

// Stores to shared memory of a block of the cluster, which complete their bytes on an mbarrier there.
void execute_st_async(Warp& warp, const Inst& inst) {
  const u32 size = static_cast<u32>(inst.ds) * inst.vec;
  lanes(warp, [&](int lane) {
    const u32 address = static_cast<u32>(address_of(warp, inst, lane));
    const SharedBytes to = locate_shared(warp, inst, lane, address, size, size);
    SharedBytes at;
    MBarrier& barrier = async_mbarrier_at(warp, inst, lane, R<u32>(warp, inst.b)[lane], at);
    if (to.block != at.block) {
      fault(warp, inst, lane, "st.async to block rank %u, but its mbarrier is in block rank %u", to.block->rank,
            at.block->rank);
    }
    begin_flight(warp, inst, lane, *to.block, to.offset, size, flight_stamp(warp, kStAsync), false);
    RemoteStore store = {to.offset, size, {}, stamp_of(warp, StampKind::kAsync)};
    for (u32 k = 0; k < inst.vec; ++k) {
      const u64 value = get_register(warp, inst.x[k], inst.ds, lane);
      memcpy(store.bytes + inst.ds * k, &value, inst.ds);
    }
    barrier.stores.push_back(store);
    counters().st_async_bytes += size;
    release(warp, to.block == warp.block ? barrier.release : barrier.sent);
    expect_or_send(warp, inst, lane, barrier, 0, size);
  });
}

}  // namespace soft
