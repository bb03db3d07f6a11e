// What comes after what: vector clocks of the warps of a cluster. A warp's own clock moves on with each release, so
// that what it does later is not taken for known, and with each barrier of its lanes, which orders their accesses
// before it and none behind it. PTX ISA, "Memory Consistency Model", and "Async proxy" for what a proxy fence is needed
// for.
#include <algorithm>

#include "execution/state.hpp"

namespace soft {

// A fence of the thread that touched the bytes, after it did, which `warp` comes after. Later fences help no sooner
// than the first.
bool async_ordered(const Warp& warp, Stamp earlier) {
  if (kind_of(earlier) == StampKind::kAsync) return ordered(warp, earlier);
  const u32 other = warp_of(earlier);
  const std::vector<u32>& fences = warp.block->cl->state->warps[other].proxy_fences;
  const auto first = std::lower_bound(fences.begin(), fences.end(), clock_of(earlier));
  return first != fences.end() && ordered(warp, make_stamp(StampKind::kPlain, other, *first));
}

static void advance(Warp& warp) {
  u32& clock = warp.state->known[warp_number(warp)];
  if (clock + 1 < 1u << kClockBits) ++clock;  // beyond it, steps are no longer told apart
}

static void join(VectorClock& into, const VectorClock& from) {
  into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void release(Warp& warp, VectorClock& into) {
  join(into, warp.state->known);
  advance(warp);
}

void acquire(Warp& warp, const VectorClock& from) {
  const u32 me = warp_number(warp), mine = warp.state->known[me];
  if (!from.empty()) join(warp.state->known, from);
  warp.state->known[me] = mine;
}

// Shuffles, votes and reductions order no accesses. PTX ISA, "bar.warp.sync".
void order_lanes(Warp& warp, u32 lanes) {
  WarpState& state = *warp.state;
  const u32 clock = state.known[warp_number(warp)] + 1;
  advance(warp);
  if ((lanes & warp.live) == warp.live) {
    state.lanes_ordered = clock;
    state.pairs.clear();
    return;
  }
  state.pairs.resize(32 * 32);
  u32 joined[32] = {};
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
    const u32* const row = state.pairs.data() + 32 * first_lane(rest);
    for (int lane = 0; lane < 32; ++lane) joined[lane] = std::max(joined[lane], row[lane]);
  }
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) joined[first_lane(rest)] = clock;
  for (u32 rest = lanes; rest != 0; rest &= rest - 1) {
    std::copy(joined, joined + 32, state.pairs.begin() + 32 * first_lane(rest));
  }
}

// Does the lane come after an access of its warp's?
bool lanes_ordered(const Warp& warp, int lane, int earlier_lane, Stamp earlier) {
  constexpr u32 kLastClock = (1u << kClockBits) - 1;
  const WarpState& state = *warp.state;
  const u32 clock = clock_of(earlier);
  if (lane == earlier_lane && lane < kAllOfThem) return true;
  if (earlier_lane == kNotKnown || clock < state.lanes_ordered || clock == kLastClock) return true;
  if (state.pairs.empty()) return false;
  const auto in = [](int one, int of) { return of == kAllOfThem || one == of; };
  for (int a = 0; a < 32; ++a) {
    for (int b = 0; b < 32; ++b) {
      if (a != b && in(a, lane) && in(b, earlier_lane) && state.pairs[32 * a + b] <= clock) return false;
    }
  }
  return true;
}

void fence_async_proxy(Warp& warp) {
  std::vector<u32>& fences = warp.state->proxy_fences;
  fences.push_back(warp.state->known[warp_number(warp)]);
  advance(warp);
}

}  // namespace soft
