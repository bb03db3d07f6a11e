// Rows whose elements are not consecutive (the reduced axis is not the last one): any strides, no copy.
//
// kLanes neighbouring rows, which are neighbours in memory, lie along threadIdx.x; kThreads / kLanes threads walk down
// each of them, kItems elements at a time. The first tile of a row stays in registers: a row of at most kItems *
// kThreads / kLanes elements is read once, of a longer one the rest is read twice.
//
// Where rows are few and long, blocks share them: one launch reduces, another normalises. As in softmax_split.cuh the
// states of a row's parts are merged in one order, however many blocks there are: block b has the `share` parts from
// (b % splits) * share on of row group b / splits. Shared memory: two sets of kLanes states a warp.
#pragma once

#include <primitives/block.cuh>
#include <primitives/columns.cuh>
#include <primitives/softmax_ops.cuh>

template <class Op, SoftmaxPass kPass, int kLanes, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) softmax_strided(const __grid_constant__ typename Op::Params params) {
  constexpr int kStep = kThreads / kLanes;             // columns from one item of a thread to the next
  constexpr int kAhead = kItems > 1 ? kItems / 2 : 1;  // items in flight beyond the first tile
  using State = typename Op::State;
  using Items = typename Op::template Items<1>;

  // Row and parts of this thread. Threads past the last row own no column but take part in every collective.
  const int thread = static_cast<int>(threadIdx.x) / kLanes;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const long long row = static_cast<long long>(blockIdx.x / splits) * kLanes + threadIdx.x % kLanes;
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);
  const long long first_part = blockIdx.x % splits * params.share;
  const long long end_part = min(first_part + params.share, params.parts);
  const long long begin = first_part * params.slice;
  const long long end = min(begin + (end_part - first_part) * params.slice, exists ? params.cols : 0);
  State* partial = static_cast<State*>(params.partial) + (exists ? row : 0) * params.parts;

  State total = State::identity();
  typename State::Part kept{};  // of the first tile
  Items first[kItems];
  int done = 0;  // parts
  if constexpr (kPass != kNormalize) {
    const int tiles = static_cast<int>(params.slice / (kAhead * kStep));  // of a part, of kAhead items
    const long long last = begin + (end_part - first_part) * params.slice;
    State all = State::identity();  // of the parts that this thread merges
    long long tile = begin;
    int left = tiles;
    if (first_part == 0) {
      // The first tile of the row, which stays.
      load_tile<false, kStep, 1, kItems>(op, first, begin + thread, begin, end);
      kept = op.template accumulate<1>(first, items_inside<kItems>(end - thread, kStep), total);
      total = State::of(kept);
      tile += kItems * kStep;
      left -= kItems / kAhead;
    }
    // The others, as many for every row of the block; rows of one part are merged below.
    for (; tile < min(last, params.cols); tile += kAhead * kStep) {
      Items items[kAhead];
      load_tile<false, kStep, 1, kAhead>(op, items, tile + thread, begin, end);
      const int used = items_inside<kAhead>(end - tile - thread, kStep);
      total = total.extend(op.template accumulate<1>(items, used, total), op.unit);
      if (params.parts == 1 || (--left > 0 && tile + kAhead * kStep < min(last, params.cols))) continue;
      const int merges = (first_part + done) % kStep;  // the threads that keep the part
      total = column_merge<kLanes, kThreads>(total, op.unit, done, merges);
      if (kPass == kReduce) {
        if (thread == merges && exists) store_state(partial + (first_part + done), total);
      } else if (thread == merges) {
        all = all.merge(total, op.unit);
      }
      total = State::identity();
      left = tiles;
      ++done;
    }
    if (params.parts > 1) {
      if (kPass == kReduce) return;
      total = all;
    }
  } else {
    for (long long i = thread; i < params.parts; i += kStep) {
      total = total.merge(load_state(partial + i), op.unit);
    }
  }
  total = column_merge<kLanes, kThreads>(total, op.unit, done);

  if constexpr (kPass == kReduce) {
    if (thread == 0 && exists) op.store_stat(total, row);
    return;
  }

  // Normalise: the tile that stayed, or once more in the same two steps, then the others.
  long long rest = begin;
  if (first_part == 0) {
    if constexpr (kPass == kNormalize) {
      load_tile<true, kStep, 1, kItems>(op, first, begin + thread, begin, end);
      kept = op.template accumulate<1>(first, items_inside<kItems>(end - thread, kStep), State::identity());
    }
    op.finish(kept, total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.settle(first[i]);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.template store<false>(first[i], begin + thread + i * kStep, begin, end);
    rest += kItems * kStep;
  }
  op.finish(total, total);
  for (long long tile = rest; tile < end; tile += kAhead * kStep) {
    Items items[kAhead];
    load_tile<true, kStep, 1, kAhead>(op, items, tile + thread, begin, end);
    const int used = items_inside<kAhead>(end - tile - thread, kStep);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < used) op.prepare(items[i], total);
      op.template store<false>(items[i], tile + thread + i * kStep, begin, end);
    }
  }
  if (thread == 0 && exists && first_part == 0) op.store_stat(total, row);
}
