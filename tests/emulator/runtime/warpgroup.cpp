// Do the warps of a warpgroup execute the same instructions? Each compares its own with the first warp's that came to
// the same place.
#include "warpgroup.hpp"

#include <deque>

namespace emu {

namespace {

struct Warpgroup {
  std::deque<WarpgroupStep> steps;  // those that not all four warps have taken
  std::deque<int> first_warps;      // who took them first
  uint32_t forgotten;               // steps before those
  uint32_t taken[4];                // of each warp
};

std::vector<Warpgroup> warpgroups;  // of the cluster

size_t groups_of_a_block() { return (machine.block_threads + 127) / 128; }

Warpgroup& warpgroup_of(const Warp& warp) {
  const Thread& first = warp.threads[0];
  return warpgroups[first.block->rank * groups_of_a_block() + first.index / 128];
}

void forget_steps_of_all(Warpgroup& group) {
  while (!group.steps.empty()) {
    for (const uint32_t taken : group.taken) {
      if (taken <= group.forgotten) return;
    }
    group.steps.pop_front();
    group.first_warps.pop_front();
    ++group.forgotten;
  }
}

}  // namespace

void begin_wgmma();
void begin_registers();
void complete_wgmma(Warp& warp, Collective what, Site site);
void complete_setmaxnreg(const Warp& warp, Collective what);
void check_wgmma_waited(const Thread& thread);

void begin_warpgroups() {
  warpgroups.clear();
  if (machine.launch.arch != kSm90a) return;
  warpgroups.assign(machine.cluster_blocks * groups_of_a_block(), {});
  begin_wgmma();
  begin_registers();
}

void complete_warpgroup_collective(Warp& warp, Collective what, Site site) {
  if (what >= Collective::kSetmaxnregDec) {
    complete_setmaxnreg(warp, what);
  } else {
    complete_wgmma(warp, what, site);
  }
}

const char* difference(const WarpgroupStep& a, const WarpgroupStep& b) {
  if (strcmp(a.name, b.name) != 0 || !same_place(a.site, b.site)) {
    return "the call";
  }
  if (a.number != b.number) return "the number of columns or registers";
  if (a.half != b.half) return "the type";
  if (a.a != b.a || a.upper_a != b.upper_a) return "the descriptor of a";
  if (a.b != b.b || a.upper != b.upper) return "the descriptor of b";
  return a.accumulate != b.accumulate ? "accumulate" : nullptr;
}

void check_warpgroup(const Thread& thread, const char* what, Site site) {
  check_sm_90a(thread, what, site);
  const int first = thread.index / 128 * 4;
  if (machine.block_threads >= 32 * (first + 4)) return;
  fault(thread, site, "%s needs a warpgroup, here warps %d to %d, but the block has %d threads", what, first, first + 3,
        machine.block_threads);
}

void take_step(const Warp& warp, const WarpgroupStep& step) {
  Warpgroup& group = warpgroup_of(warp);
  const Thread& thread = warp.threads[0];
  const int me = thread.index / 32;
  const uint32_t number = group.taken[me % 4]++;
  const uint32_t place = number - group.forgotten;
  if (place == group.steps.size()) {
    for (int other = me / 4 * 4; other < me / 4 * 4 + 4; ++other) {
      if (other == me || thread.block->warps[other].exited == 0) continue;
      fault(thread, step.site, "%s, but warp %d of its warpgroup has exited without it", step.name, other);
    }
    group.steps.push_back(step);
    group.first_warps.push_back(me);
  } else if (const char* what = difference(step, group.steps[place])) {
    const WarpgroupStep& other = group.steps[place];
    fault(thread, step.site,
          "%s, number %u of its warp, differs in %s from what warp %d of its warpgroup executed there: %s at %s:%d",
          step.name, number, what, group.first_warps[place], other.name, short_name(other.site.file), other.site.line);
  }
  forget_steps_of_all(group);
}

void check_warpgroup_exit(const Thread& thread) {
  if (warpgroups.empty()) return;
  check_wgmma_waited(thread);
  const Warpgroup& group = warpgroup_of(*thread.warp);
  const uint32_t mine = group.taken[thread.index / 32 % 4] - group.forgotten;
  if (mine >= group.steps.size()) return;
  const WarpgroupStep& next = group.steps[mine];
  fault(thread, next.site, "exited without a %s that warp %d of its warpgroup executed", next.name,
        group.first_warps[mine]);
}

}  // namespace emu
