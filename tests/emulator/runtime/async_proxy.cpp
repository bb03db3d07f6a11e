// The async proxy, through which bulk copies and wgmma access shared memory: what ordinary instructions did to the same
// bytes is ordered before it by a fence of every thread that did it, and a barrier after the fence.
#include <algorithm>

#include "state.hpp"

namespace emu {

void begin_readings();

namespace {

// Has thread `index` of block `rank` made a fence since its clock was `clock`, which `thread` comes after? Later ones
// help no sooner than the first.
bool fenced(const Thread& thread, int rank, int index, uint32_t clock) {
  const std::vector<Stamp>& fences = machine.proxy_fences[rank * machine.block_threads + index];
  const auto first = std::lower_bound(fences.begin(), fences.end(), clock,
                                      [](const Stamp& fence, uint32_t least) { return fence.clock < least; });
  return first != fences.end() && ordered(thread, *first);
}

}  // namespace

void begin_async_proxy() {
  machine.proxy_fences.resize(machine.threads.size());
  for (std::vector<Stamp>& fences : machine.proxy_fences) fences.clear();
  begin_readings();
}

void fence_proxy_async(Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "fence_proxy_async", site);
  machine.proxy_fences[&thread - machine.threads.data()].push_back(make_stamp(thread, Stamp::kPlain));
  advance(thread);
}

bool async_ordered(const Thread& thread, const Stamp& earlier) {
  switch (earlier.kind) {
    case Stamp::kPlain:
    case Stamp::kStrong:
      return fenced(thread, earlier.rank, earlier.thread, earlier.clock);
    case Stamp::kWarp:
      for (int lane = 0; lane < 32; ++lane) {
        const uint32_t clock = machine.warp_clocks[earlier.object].clock[lane];
        if (!fenced(thread, earlier.rank, earlier.thread + lane, clock)) return false;
      }
      return true;
    default:
      return ordered(thread, earlier);  // the async proxy's own
  }
}

}  // namespace emu
