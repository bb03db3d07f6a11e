// Which warp of a cluster runs next, and for how long: chosen at random by a seed, so that what depends on the order of
// warps shows, and shows again. A warp that can only wait is asleep until what it waits for happens; when all sleep or
// poll in vain it is a deadlock, and the error names each group of lanes with its instruction.
#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "execution/state.hpp"

namespace soft {

namespace {

// Warp instructions of one cluster; a kernel that runs longer never ends (SOFTWARE_DEVICE_LIMIT).
const u64 kLimit =
    getenv("SOFTWARE_DEVICE_LIMIT") ? strtoull(getenv("SOFTWARE_DEVICE_LIMIT"), nullptr, 0) : u64(1) << 33;

constexpr int kRoundsInVain = 200;  // of all warps that poll, with no event between, before it is a deadlock

std::string describe_wait(Warp& warp, const Group& group) {
  const Inst& inst = warp.f->code[group.pc];
  const int lane = first_lane(group.mask);
  char text[96] = "";
  if (group.wait == AtBarrier) {
    const Barrier& barrier = warp.block->state->barriers[group.arg];
    snprintf(text, sizeof text, " (barrier %u: %u of %u threads have arrived)", group.arg, barrier.arrived,
             barrier.expected ? barrier.expected : warp.block->live_threads);
  } else if (group.wait == AtCollective) {
    snprintf(text, sizeof text, " (lanes 0x%08x of 0x%08x are there)", group.mask, group.arg & warp.live);
  } else if (group.wait == AtCluster) {
    const Cluster& cluster = *warp.block->cl;
    snprintf(text, sizeof text, " (%u of %u threads of the cluster have arrived)", cluster.arrived, cluster.live);
  } else if (group.wait == AtRegisters) {
    snprintf(text, sizeof text, " (its warp has %u registers per thread, and %u are free)", warp.state->registers,
             warp.block->state->free_registers);
  } else if (group.wait == Polling && group.pc > 0) {  // behind the instruction that polled
    const Inst& poll = warp.f->code[group.pc - 1];
    return describe(warp, poll, lane) + describe_mbarrier(warp, poll, lane);
  }
  return describe(warp, inst, lane) + text;
}

// An error of all warps that have not exited.
[[noreturn]] void fault_all(Cluster& cluster, std::string text) {
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) {
      for (int x = 0; x < warp.ng; ++x) {
        text += "\n  warp " + std::to_string(warp.index) + ": " + describe_wait(warp, warp.g[x]);
        if (text.size() > 8000) throw std::runtime_error(text + "\n  ...");
      }
    }
  }
  throw std::runtime_error(text);
}

}  // namespace

u64 next_random(u64& state) {  // splitmix64
  state += 0x9e3779b97f4a7c15;
  u64 x = state;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

void wake(Warp& warp) {
  if (warp.state->queued) return;
  warp.state->queued = true;
  warp.block->cl->state->runnable.push_back(&warp);
}

void run_cluster(Cluster& cluster, u64& random) {
  std::vector<Warp*>& runnable = cluster.state->runnable;
  std::vector<Warp*> polling;
  size_t alive = 0;
  runnable.clear();
  for (Block* block : cluster.blocks) {
    for (Warp& warp : block->warps) {
      warp.state->queued = false;
      wake(warp);
      ++alive;
    }
  }
  int rounds_in_vain = 0;
  u64 seen = cluster.changes, ran = 0;
  while (alive != 0) {
    if (runnable.empty()) {
      if (polling.empty() || rounds_in_vain == kRoundsInVain) fault_all(cluster, "deadlock: every warp waits");
      rounds_in_vain = cluster.changes == seen ? rounds_in_vain + 1 : 0;
      seen = cluster.changes;
      runnable.swap(polling);
    }
    const u64 number = next_random(random);
    const size_t index = number % runnable.size();
    Warp& warp = *runnable[index];
    // Mostly long, as on a GPU whose other warps wait for memory; sometimes a few instructions.
    const u64 budget = u64(16) << (number >> 32) % 12;
    const Progress progress = run_warp(warp, budget);
    if (progress == Progress::kRan && (ran += budget) > kLimit) fault_all(cluster, "a kernel that does not end");
    if (progress == Progress::kRan) {
      rounds_in_vain = 0;
      continue;
    }
    *std::find(runnable.begin() + static_cast<long>(index), runnable.end(), &warp) = runnable.back();
    runnable.pop_back();
    if (progress == Progress::kPolled) {
      polling.push_back(&warp);  // still queued
      continue;
    }
    warp.state->queued = false;
    rounds_in_vain = 0;
    if (progress == Progress::kDone) --alive;
  }
}

}  // namespace soft
