// Rows that lie beside each other along the lanes of a warp: what softmax_strided and softmax_segments share.
#pragma once

#include <primitives/softmax_state.cuh>
#include <ptx/smem.cuh>

// Merges kCount states per column, which lie kLanes apart in shared memory. The whole warp calls it; the lanes of a
// column share its slots: one each, several lanes the same one, or several each.
template <int kLanes, int kCount, class State, class Acc>
__device__ __forceinline__ State merge_slots(const State* slots, Acc unit) {
  constexpr int kEach = kCount * kLanes / 32;
  const int lane = threadIdx.x % 32;
  if constexpr (kEach <= 1) {
    const int slot = lane / kLanes % kCount;
    return load_shared_state(slots + slot * kLanes + lane % kLanes).template merge_group<kCount, kLanes>(unit);
  } else {
    State slot[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      slot[i] = load_shared_state(slots + (i * (32 / kLanes) + lane / kLanes) * kLanes + lane % kLanes);
    }
    return State::merge_all(slot, unit).template merge_group<32 / kLanes, kLanes>(unit);
  }
}

// Merges the states of threads that share threadIdx.x % kLanes, which are equal over those of a warp. Every thread of
// the block calls it; with `only` not negative only the threads with threadIdx.x / kLanes == only are sure to get
// the result. Calls with `round` 0, 1, 2 ... may follow each other: there are two sets of slots, and no warp is two
// barriers ahead of another. Shared memory: 2 * kLanes states per warp.
template <int kLanes, int kThreads, class State, class Acc>
__device__ __forceinline__ State column_merge(State state, Acc unit, int round = 0, int only = -1) {
  constexpr int kWarps = kThreads / 32;
  if constexpr (kWarps == 1) return state;
  State* slots = ptx::static_smem<State, 2 * kWarps * kLanes>() + round % 2 * kWarps * kLanes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane < kLanes) store_shared_state(slots + warp * kLanes + lane, state);
  __syncthreads();  // every warp's states are written before any warp reads them all
  if (only >= 0 && warp != only * kLanes / 32) return state;

  return merge_slots<kLanes, kWarps>(slots, unit);
}

// How many of kItems items, kStep columns apart, begin in the next `cols` columns.
template <int kItems>
__device__ __forceinline__ int items_inside(long long cols, int step) {
  const long long items = (cols + step - 1) / step;
  return items < kItems ? static_cast<int>(items) : kItems;
}

// Items of one element from `first_col` on, `step` columns apart, as far as they lie before `end`: all loads are in
// flight before the first is waited for. Where all lie before `end`, none is compared with it: predicates are few.
template <bool kStreaming, int kTile, class Op, class Items>
__device__ __forceinline__ void load_steps(const Op& op, Items (&items)[kTile], long long first_col, int step,
                                           long long end) {
  const auto load_until = [&](auto end_of) {
    typename Op::template Loaded<1> loaded[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const long long col = first_col + i * step;
      op.template load<kStreaming>(loaded[i], col, col, end_of(col));
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const long long col = first_col + i * step;
      op.unpack(items[i], loaded[i], col, col, end_of(col));
    }
  };
  if (Op::Params::kOneProduct && first_col + (kTile - 1) * step < end) {
    load_until([](long long col) { return col + 1; });
  } else {
    load_until([end](long long) { return end; });
  }
}
