// Barriers of a block. PTX ISA, "bar, barrier": a barrier is over once as many threads have arrived as the instructions
// say, or all threads of the block that have not exited.
#include "execution/counters.hpp"

namespace soft {

namespace {

u32 threads_in_warps(u32 threads) { return (threads + 31) / 32 * 32; }

// Notes the arrival of some lanes and checks that it agrees with those before.
Barrier& arrive(Warp& warp, u32 lanes, const Inst& inst) {
  Block& block = *warp.block;
  const int lane = first_lane(lanes);
  const u32 id = R<u32>(warp, inst.a)[lane], all = threads_in_warps(block.threads);
  const bool counted = inst.flag != 0;
  const u32 expected = counted ? R<u32>(warp, inst.b)[lane] : 0;
  if (id > 15) fault(warp, inst, lane, "barrier %u: they are numbered 0 to 15", id);
  if (counted && (expected == 0 || expected % 32 != 0 || expected > all)) {
    fault(warp, inst, lane, "barrier %u for %u threads: the count must be a multiple of 32 and at most the block's %u",
          id, expected, all);
  }
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
    const int other = first_lane(rest);
    if (R<u32>(warp, inst.a)[other] != id || (counted && R<u32>(warp, inst.b)[other] != expected)) {
      fault(warp, inst, other, "a barrier whose number or count differs between the lanes of a warp");
    }
  }
  Barrier& barrier = block.state->barriers[id];
  if (barrier.arrived == 0) {
    barrier.inst = &inst;
    barrier.expected = expected;
    barrier.lanes.assign(block.warps.size(), 0);
    barrier.release.clear();
    barrier.count = barrier.any = 0;
  } else if ((barrier.expected ? barrier.expected : all) != (expected ? expected : all)) {
    fault(warp, inst, lane, "barrier %u for %u threads, but others of the block say %u", id, expected ? expected : all,
          barrier.expected ? barrier.expected : all);
  }
  if (barrier.lanes[warp.index] & lanes) {
    fault(warp, inst, lane, "arrives twice at barrier %u in one phase", id);
  }
  barrier.lanes[warp.index] |= lanes;
  // A count is of whole warps, the last one of the block too.
  barrier.arrived += counted && lanes == warp.live ? 32 : static_cast<u32>(__builtin_popcount(lanes));
  if (barrier.expected != 0 && barrier.arrived > barrier.expected) {
    fault(warp, inst, lane, "more threads arrive at barrier %u than the %u that it is for", id, barrier.expected);
  }
  release(warp, barrier.release);
  ++block.cl->changes;
  return barrier;
}

// barrier.red: how many, any or all of the threads brought a true predicate.
void give_result(Warp& warp, const Group& group, const Inst& inst, const Barrier& barrier) {
  warp.mask = group.mask;
  if (inst.size == 0) {
    lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = barrier.count; });
    return;
  }
  const bool result = inst.size == 1 ? barrier.count == barrier.any : barrier.count != 0;  // and, or
  set_predicate(warp, inst.d, result ? ~0u : 0);
}

}  // namespace

void barrier_sync(Warp& warp, Group& group, const Inst& inst) {
  Barrier& barrier = arrive(warp, group.mask, inst);
  if (inst.kind == BarRed) {
    const u32 predicate = *R<u32>(warp, inst.c) ^ (inst.vec ? ~0u : 0);
    barrier.count += static_cast<u32>(__builtin_popcount(predicate & group.mask));
    barrier.any += static_cast<u32>(__builtin_popcount(group.mask));
  }
  group.wait = AtBarrier;
  group.arg = static_cast<u32>(&barrier - warp.block->state->barriers);
  complete_barriers(*warp.block);
}

void barrier_arrive(Warp& warp, u32 lanes, const Inst& inst) {
  arrive(warp, lanes, inst);
  complete_barriers(*warp.block);
}

void complete_barriers(Block& block) {
  for (u32 id = 0; id < 16; ++id) {
    Barrier& barrier = block.state->barriers[id];
    if (barrier.arrived == 0) continue;
    if (barrier.arrived < (barrier.expected ? barrier.expected : block.live_threads)) continue;
    barrier.arrived = 0;
    ++(id == 0 ? counters().barriers : counters().named_barriers);
    ++block.cl->changes;
    for (Warp& warp : block.warps) {
      for (int x = 0; x < warp.ng; ++x) {
        Group& group = warp.g[x];
        if (group.wait != AtBarrier || group.arg != id) continue;
        const Inst& inst = warp.f->code[group.pc];
        if (inst.kind == BarRed) give_result(warp, group, inst, barrier);
        acquire(warp, barrier.release);
        order_lanes(warp, barrier.lanes[warp.index]);
        group.wait = Ready;
        group.arg = 0;
        ++group.pc;
        wake(warp);
      }
    }
  }
}

}  // namespace soft
