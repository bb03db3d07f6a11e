// Rows whose elements are not consecutive (the reduced axis is not the last one), and ragged rows: any strides, no
// copy.
//
// kLanes neighbouring rows, which are neighbours in memory, lie along threadIdx.x; kThreads / kLanes threads walk down
// each of them, kItems elements at a time. The first tile of a thread stays in registers: a row of at most kItems *
// kThreads / kLanes elements is read once, of a longer one the rest is read twice.
//
// Where rows are few and long, slices of them are reduced by one launch and normalised by another (softmax_split.cuh).
//
// Offset: void, or the type of params.offsets; then row r is column r % segment_width of ragged segment r /
// segment_width. Block b has slice b % splits of row group b / splits. Shared memory: kLanes states a warp.
#pragma once

#include <primitives/block.cuh>
#include <primitives/softmax_ops.cuh>

// Merges the states of threads that share threadIdx.x % kLanes; every thread of the block calls it, once.
template <int kLanes, int kThreads, class State>
__device__ __forceinline__ State column_merge(State state) {
  constexpr int kWarps = kThreads / 32;
  state = state.template merge_group<32 / kLanes, kLanes>();
  if constexpr (kWarps == 1) return state;
  State* slots = ptx::static_smem<State, kWarps * kLanes>();
  const int lane = threadIdx.x % 32;
  if (lane < kLanes) ptx::st_shared(slots + threadIdx.x / 32 * kLanes + lane, state);
  __syncthreads();  // every warp's states are written before any warp reads them all

  // The lanes of a column share its slots: one each, some lanes the same one, or several each.
  constexpr int kSlots = kWarps * kLanes / 32;
  if constexpr (kSlots <= 1) {
    const int warp = lane / kLanes % kWarps;
    return ptx::ld_shared(slots + warp * kLanes + lane % kLanes).template merge_group<kWarps, kLanes>();
  } else {
    State slot[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      slot[i] = ptx::ld_shared(slots + (i * (32 / kLanes) + lane / kLanes) * kLanes + lane % kLanes);
    }
    return State::merge_all(slot).template merge_group<32 / kLanes, kLanes>();
  }
}

// How many of kItems items, kStep columns apart, begin in the next `cols` columns.
template <int kItems, int kStep>
__device__ __forceinline__ int items_inside(long long cols) {
  const long long items = (cols + kStep - 1) / kStep;
  return items < kItems ? static_cast<int>(items) : kItems;
}

template <class Op, SoftmaxPass kPass, class Offset, int kLanes, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) softmax_strided(const __grid_constant__ typename Op::Params params) {
  constexpr int kStep = kThreads / kLanes;             // columns from one item of a thread to the next
  constexpr int kAhead = kItems > 1 ? kItems / 2 : 1;  // items in flight beyond the first tile
  using State = typename Op::State;
  using Items = typename Op::template Items<1>;

  // Row and slice of this thread. Threads past the last row own no column but take part in every collective.
  const int thread = static_cast<int>(threadIdx.x) / kLanes;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const long long split = blockIdx.x % splits;
  const long long row = static_cast<long long>(blockIdx.x / splits) * kLanes + threadIdx.x % kLanes;
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);

  long long begin = split * params.slice;
  long long end = exists ? min(begin + params.slice, params.cols) : begin;
  if constexpr (!kIsSame<Offset, void>) {
    // Whatever the offsets hold, the segment stays inside x.
    const Offset* offset = static_cast<const Offset*>(params.offsets) + (exists ? row / params.segment_width : 0);
    begin = min(max(static_cast<long long>(ptx::ld_global(offset)), 0LL), params.cols);
    end = exists ? min(max(static_cast<long long>(ptx::ld_global(offset + 1)), begin), params.cols) : begin;
  }

  State total = State::identity();
  State first_part = total;
  Items first[kItems];
  State* partial = static_cast<State*>(params.partial) + (exists ? row : 0) * splits;
  if constexpr (kPass != kNormalize) {
    // Reduce: the first tile, which stays, then the others.
    const long long first_col = begin + thread;
    load_tile<false, kStep, 1, kItems>(op, first, first_col, begin, end);
    first_part = total = op.template accumulate<1>(first, items_inside<kItems, kStep>(end - first_col), total);
    for (long long tile = begin + kItems * kStep; tile < end; tile += kAhead * kStep) {
      Items items[kAhead];
      load_tile<false, kStep, 1, kAhead>(op, items, tile + thread, begin, end);
      const int used = items_inside<kAhead, kStep>(end - tile - thread);
      total = total.extend(op.template accumulate<1>(items, used, total));
    }
  } else {
    for (long long i = thread; i < splits; i += kStep) {
      total = total.merge(ptx::ld_global(partial + i));
    }
  }
  total = column_merge<kLanes, kThreads>(total);

  if constexpr (kPass == kReduce) {
    if (thread == 0 && exists) {
      if (params.partial) {
        ptx::st_global(partial + split, total);
      } else {
        op.store_stat(total, row);
      }
    }
    return;
  }

  // Normalise: the tile that stayed, then the others once more.
  long long rest = begin;
  if constexpr (kPass == kFused) {
    op.finish(first_part, total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.template store<false>(first[i], begin + thread + i * kStep, begin, end);
    rest += kItems * kStep;
  }
  op.finish(total, total);
  for (long long tile = rest; tile < end; tile += kAhead * kStep) {
    Items items[kAhead];
    load_tile<true, kStep, 1, kAhead>(op, items, tile + thread, begin, end);
    const int used = items_inside<kAhead, kStep>(end - tile - thread);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < used) op.prepare(items[i], total);
      op.template store<false>(items[i], tile + thread + i * kStep, begin, end);
    }
  }
  if (thread == 0 && exists && split == 0) op.store_stat(total, row);
}
