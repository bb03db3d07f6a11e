// A warp: groups of lanes with one pc each. Where a branch divides a group there are two, and where the pcs of two meet
// there is one again; the group with the lowest pc runs first, which makes them meet where the code does. Warp
// instructions (shfl, vote, mma, ...) run once all lanes of their mask are there. PTX ISA, "Directives and
// Instructions: Predicated Execution", "Control Flow Instructions", and each .sync instruction's rules for its mask.
#include <algorithm>

#include "execution/counters.hpp"

namespace soft {

void check_wgmma_registers(Warp& warp, const Inst& inst);  // matrix/wgmma.cpp
bool wgmma_in_flight(const Warp& warp);

namespace {

constexpr u32 kAllLanes = 0xffffffff;

void remove_group(Warp& warp, int index) { warp.g[index] = warp.g[--warp.ng]; }

// Groups that stand at one pc, waiting for the same, become one.
void merge_groups(Warp& warp) {
  for (int x = 0; x < warp.ng; ++x) {
    Group& group = warp.g[x];
    for (int y = x + 1; y < warp.ng;) {
      const Group& other = warp.g[y];
      const bool mergeable = group.wait == Ready || group.wait == AtCollective || group.wait == AtCluster;
      if (group.pc != other.pc || group.wait != other.wait || !mergeable || group.arg != other.arg) {
        ++y;
        continue;
      }
      group.mask |= other.mask;
      remove_group(warp, y);
    }
  }
}

// Is this instruction executed by the lanes of a mask together?
bool is_collective(const Inst& inst) {
  switch (inst.kind) {
    case WarpSync:
    case Collective:
    case TakeRegisters:
      return true;
    case BarSync:
    case BarArrive:
    case BarRed:
      return inst.aligned;
    default:
      return false;
  }
}

// The lanes that must be there, in the view of a lane; those that have exited are not waited for.
u32 lanes_needed(Warp& warp, const Inst& inst, int lane) {
  if (inst.aligned) return warp.live;
  const u32 mask = R<u32>(warp, inst.y[0])[lane];
  if (!(mask >> lane & 1)) fault(warp, inst, lane, "lane %d is not in its own mask 0x%08x", lane, mask);
  return mask;
}

void count_execution(u32 pc, u32 lanes) {
  ++executed[pc].warps;
  executed[pc].lanes += lanes == kAllLanes ? 32 : static_cast<u64>(__builtin_popcount(lanes));
}

// Ends the group's instruction, which is a warp instruction all of whose lanes are there. Returns whether it waits now.
bool complete_collective(Warp& warp, Group& group, const Inst& inst) {
  count_execution(group.pc, group.mask);
  warp.mask = group.mask;
  if (inst.aligned && group.mask != kAllLanes && (inst.kind == Collective || inst.kind == TakeRegisters)) {
    const int lane = first_lane(~group.mask);
    fault(warp, inst, first_lane(group.mask), "needs all 32 lanes of the warp, but lane %d has exited or never was",
          lane);
  }
  switch (inst.kind) {
    case Collective:
      inst.fn(warp, inst);
      break;
    case TakeRegisters:
      request_registers(warp, inst);
      if (!take_registers(warp, inst)) {
        group.wait = AtRegisters;
        return true;
      }
      break;
    case BarArrive:
      barrier_arrive(warp, group.mask, inst);
      break;
    case BarSync:
    case BarRed:
      barrier_sync(warp, group, inst);
      return true;
    default:  // bar.warp.sync
      order_lanes(warp, group.mask);
      break;
  }
  ++group.pc;
  group.wait = Ready;
  return false;
}

// A group of lanes has come to a warp instruction: one group for each mask that they bring.
void come_to_collective(Warp& warp, int index, const Inst& inst) {
  u32 rest = warp.g[index].mask;
  const u32 pc = warp.g[index].pc;
  bool first = true;
  while (rest != 0) {
    const int lane = first_lane(rest);
    const u32 needed = lanes_needed(warp, inst, lane);
    u32 alike = 0;
    for (u32 lanes = rest; lanes != 0; lanes &= lanes - 1) {
      const int other = first_lane(lanes);
      if (lanes_needed(warp, inst, other) == needed) alike |= 1u << other;
    }
    rest &= ~alike;
    Group& group = first ? warp.g[index] : warp.g[warp.ng++];
    group = {pc, alike, AtCollective, needed};
    first = false;
  }
}

// Lanes of its mask wait at another warp instruction: no one will ever come.
void check_divergence(Warp& warp, const Group& group) {
  const Inst& inst = warp.f->code[group.pc];
  for (int x = 0; x < warp.ng; ++x) {
    const Group& other = warp.g[x];
    const u32 missing = other.mask & group.arg & warp.live & ~group.mask;
    if (other.wait != AtCollective || missing == 0) continue;
    const Inst& there = warp.f->code[other.pc];
    if (other.pc == group.pc) {
      fault(warp, inst, first_lane(group.mask),
            "lanes with different masks in a warp instruction: 0x%08x, but lane %d has 0x%08x", group.arg,
            first_lane(missing), other.arg);
    }
    fault(warp, inst, first_lane(group.mask), "divergent lanes: %s waits for lane %d, which waits at line %u: %s",
          inst.aligned ? "an aligned instruction" : "a warp instruction", first_lane(missing), there.line,
          warp.f->texts[there.text].c_str());
  }
}

// The first group whose warp instruction can run, or -1.
int find_complete(Warp& warp) {
  for (int x = 0; x < warp.ng; ++x) {
    const Group& group = warp.g[x];
    if (group.wait != AtCollective) continue;
    const u32 needed = group.arg & warp.live;
    if ((group.mask & needed) == needed) return x;
  }
  return -1;
}

void exit_lanes(Warp& warp, u32 lanes, const Inst& inst) {
  for (int x = 0; x < warp.ng; ++x) {
    const Group& group = warp.g[x];
    if (group.wait != AtCollective || (group.arg & lanes) == 0) continue;
    const Inst& there = warp.f->code[group.pc];
    if (is_lenient(*warp.f) && there.kind == BarSync) continue;
    fault(warp, there, first_lane(group.mask), "waits for lane %d, which exited without executing it",
          first_lane(group.arg & lanes));
  }
  check_exit(warp, lanes, inst);
  Block& block = *warp.block;
  const u32 count = static_cast<u32>(__builtin_popcount(lanes));
  warp.live &= ~lanes;
  block.live_threads -= count;
  block.cl->live -= count;
  ++block.cl->changes;
  complete_barriers(block);
  complete_cluster_barrier(*block.cl);
}

// Runs one group until it waits, divides, ends, meets another one or has used up the budget.
void run_group(Warp& warp, int index, u64& budget) {
  const Inst* const code = warp.f->code.data();
  const bool checked = wgmma_in_flight(warp);
  u32 pc = warp.g[index].pc, lanes = warp.g[index].mask, limit = ~0u;
  for (int x = 0; x < warp.ng; ++x) {
    if (x != index && warp.g[x].pc > pc && warp.g[x].wait != AtBarrier) limit = std::min(limit, warp.g[x].pc);
  }
  const auto stop = [&](Wait wait) { warp.g[index] = {pc, lanes, wait, 0}; };
  for (;;) {
    const Inst& inst = code[pc];
    u32 active = lanes;
    if (inst.has_pred) {
      const u32 predicate = *R<u32>(warp, inst.pred);
      active &= inst.pneg ? ~predicate : predicate;
    }
    if (__builtin_expect(checked, 0) && active) check_wgmma_registers(warp, inst);
    if (__builtin_expect(inst.kind == Normal, 1)) {
      count_execution(pc, active);
      if (active) {
        warp.mask = active;
        inst.fn(warp, inst);
      }
      ++pc;
    } else if (inst.kind == Bra) {
      count_execution(pc, active);
      if (active == lanes) {
        pc = inst.target;
      } else if (active == 0) {
        ++pc;
      } else {
        warp.g[warp.ng++] = {inst.target, active, Ready, 0};
        lanes &= ~active;
        ++pc;
        return stop(Ready);
      }
    } else if (inst.kind == Exit) {
      count_execution(pc, active);
      warp.mask = active;
      if (active == lanes) {
        remove_group(warp, index);
        return exit_lanes(warp, active, inst);
      }
      lanes &= ~active;
      ++pc;
      stop(Ready);
      if (active) exit_lanes(warp, active, inst);
      return;
    } else if (active == 0) {
      ++pc;
    } else if (active != lanes) {  // those that the predicate leaves out go on beyond it
      warp.g[warp.ng++] = {pc + 1, lanes & ~active, Ready, 0};
      lanes = active;
      return stop(Ready);
    } else if (is_collective(inst)) {
      stop(Ready);
      Group& group = warp.g[index];
      const u32 needed = lanes_needed(warp, inst, first_lane(lanes));
      const bool uniform = needed == kAllLanes || inst.aligned;
      if (uniform && (lanes & needed & warp.live) == (needed & warp.live)) {
        if (complete_collective(warp, group, inst) || checked != wgmma_in_flight(warp)) return;
        pc = group.pc;
      } else {
        return come_to_collective(warp, index, inst);
      }
    } else if (inst.kind == BarSync || inst.kind == BarRed) {
      count_execution(pc, lanes);
      stop(Ready);
      return barrier_sync(warp, warp.g[index], inst);
    } else if (inst.kind == BarArrive) {
      count_execution(pc, lanes);
      barrier_arrive(warp, lanes, inst);
      ++pc;
    } else if (inst.kind == ClusterArrive) {
      count_execution(pc, lanes);
      cluster_arrive(warp, lanes, inst);
      ++pc;
    } else if (inst.kind == ClusterWait) {
      if (!cluster_wait(warp, lanes, inst)) return stop(AtCluster);
      count_execution(pc, lanes);
      ++pc;
    } else {  // Yielding
      count_execution(pc, lanes);
      warp.mask = lanes;
      warp.yield = false;
      inst.fn(warp, inst);
      ++pc;
      if (warp.yield) return stop(Polling);
    }
    if (pc >= limit) return stop(Ready);
    if (--budget == 0) return stop(Ready);
  }
}

}  // namespace

Progress run_warp(Warp& warp, u64 budget) {
  bool polled = false;
  for (int x = 0; x < warp.ng; ++x) {
    if (warp.g[x].wait == Polling) warp.g[x].wait = Ready;
  }
  for (;;) {
    merge_groups(warp);
    int best = -1;
    for (int x = 0; x < warp.ng; ++x) {
      Group& group = warp.g[x];
      if (group.wait == AtCluster && cluster_wait(warp, group.mask, warp.f->code[group.pc])) {
        count_execution(group.pc++, group.mask);
        group.wait = Ready;
      }
      if (group.wait == AtRegisters && take_registers(warp, warp.f->code[group.pc])) {
        ++group.pc;
        group.wait = Ready;
      }
      if (group.wait == Ready && (best < 0 || group.pc < warp.g[best].pc)) best = x;
    }
    if (best < 0) {
      best = find_complete(warp);
      if (best < 0) break;
      complete_collective(warp, warp.g[best], warp.f->code[warp.g[best].pc]);
      continue;
    }
    const u32 mask = warp.g[best].mask;
    run_group(warp, best, budget);
    if (budget != 0) continue;
    // Lanes that spin must not keep the others of their warp from what they wait for.
    bool others = false;
    for (int x = 0; x < warp.ng; ++x) others |= warp.g[x].mask != mask && warp.g[x].wait == Ready;
    if (!others) return Progress::kRan;
    for (int x = 0; x < warp.ng; ++x) {
      if (warp.g[x].mask == mask && warp.g[x].wait == Ready) warp.g[x].wait = Polling, polled = true;
    }
    budget = 64;
  }
  if (warp.ng == 0) return Progress::kDone;
  for (int x = 0; x < warp.ng; ++x) {
    if (warp.g[x].wait == AtCollective) check_divergence(warp, warp.g[x]);
    polled |= warp.g[x].wait == Polling;
  }
  return polled ? Progress::kPolled : Progress::kStuck;
}

}  // namespace soft
