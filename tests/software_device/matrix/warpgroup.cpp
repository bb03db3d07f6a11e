// Do the four warps of a warpgroup execute the same wgmma and setmaxnreg? Each compares its own with the first warp's
// that came to the same place. PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
#include <algorithm>

#include "matrix/wgmma.hpp"

namespace soft {

namespace {

const char* difference(const WarpgroupStep& a, const WarpgroupStep& b) {
  if (a.inst != b.inst) return "the instruction";
  if (a.a != b.a) return "the descriptor of a";
  if (a.b != b.b) return "the descriptor of b";
  return a.accumulate != b.accumulate ? "scale-d" : nullptr;
}

Warpgroup& warpgroup_of(const Warp& warp) { return warp.block->state->warpgroups->groups[warp.index / 4]; }

}  // namespace

void check_warpgroup(const Warp& warp, const Inst& inst) {
  const u32 first = warp.index / 4 * 4, threads = warp.block->threads;
  if (threads >= 32 * (first + 4)) return;
  fault(warp, inst, 0, "needs a warpgroup, here warps %u to %u, but the block has %u threads", first, first + 3,
        threads);
}

void take_step(const Warp& warp, const WarpgroupStep& step) {
  Warpgroup& group = warpgroup_of(warp);
  const u32 number = group.taken[warp.index % 4]++, place = number - group.forgotten;
  if (place == group.steps.size()) {
    for (u32 other = warp.index / 4 * 4; other < warp.index / 4 * 4 + 4; ++other) {
      if (warp.block->warps[other].live != 0) continue;
      fault(warp, *step.inst, 0, "warp %u of its warpgroup has exited without it", other);
    }
    group.steps.push_back(step);
  } else if (const char* what = difference(step, group.steps[place])) {
    const WarpgroupStep& other = group.steps[place];
    fault(warp, *step.inst, 0,
          "number %u of its warp's wgmma and setmaxnreg differs in %s from what warp %u of its warpgroup executed "
          "there, line %u",
          number, what, other.first_warp, other.inst->line);
  }
  while (!group.steps.empty() && *std::min_element(group.taken, group.taken + 4) > group.forgotten) {
    group.steps.pop_front();
    ++group.forgotten;
  }
}

void check_wgmma_exit(const Warp& warp) {
  const WgmmaState& state = *warp.state->wgmma;
  if (!state.pending.empty()) {
    const PendingWgmma& first = state.pending.front();
    fault(warp, *first.inst, 0, "exited with %zu wgmma in flight that it never waited for, the first one %s",
          state.pending.size(), first.group < state.committed ? "committed" : "not committed");
  }
  const Warpgroup& group = warpgroup_of(warp);
  const u32 mine = group.taken[warp.index % 4] - group.forgotten;
  if (mine >= group.steps.size()) return;
  const WarpgroupStep& next = group.steps[mine];
  fault(warp, *next.inst, 0, "exited without what warp %u of its warpgroup executed", next.first_warp);
}

}  // namespace soft
