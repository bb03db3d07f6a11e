// Rows whose elements are not consecutive (the reduced axis is not the last one): any strides, no copy.
//
// kLanes neighbouring rows, which are neighbours in memory, lie along threadIdx.x; kThreads / kLanes threads walk down
// each of them, kItems elements at a time. The first tile of a row stays in registers: a row of at most kItems *
// kThreads / kLanes elements is read once; of a longer one, the rest is read twice.
//
// Where rows are few and long, blocks share them: one launch reduces, another normalises. As in softmax/split.cuh the
// states of a row's parts are merged in one order, however many blocks there are: block b has `share` parts of row
// group b / splits, from part (b % splits) * share on. Shared memory: two sets of kLanes states per warp.
#pragma once

#include <primitives/block.cuh>
#include <softmax/columns.cuh>
#include <softmax/backward.cuh>
#include <softmax/logits.cuh>

template <class Op, SoftmaxPass kPass, int kLanes, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) softmax_strided(const __grid_constant__ typename Op::Params params) {
  constexpr int kPlaces = 32 / kLanes;                        // lanes per row and warp
  constexpr int kStep = kThreads / kLanes;                    // columns from one item of a thread to the next
  constexpr int kAhead = kItems > 1 ? kItems / 2 : 1;         // items in flight beyond the first tile
  constexpr bool kOnePart = kPass == kFused && Op::kReduces;  // softmax_merge merges the parts of reductions
  using State = typename Op::State;
  using Part = typename Op::Part;
  using Items = typename Op::template Items<1>;

  // Row and parts of this thread. Threads past the last row own no column but take part in every collective.
  const int thread = static_cast<int>(threadIdx.x / kLanes);
  const unsigned splits = kPass == kFused ? 1 : static_cast<unsigned>(params.splits);
  const long long row = static_cast<long long>(blockIdx.x / splits) * kLanes + threadIdx.x % kLanes;
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);
  const long long first_part = kPass == kFused ? 0 : blockIdx.x % splits * params.share;
  const long long end_part = kPass == kFused ? params.parts : min(first_part + params.share, params.parts);
  const long long begin = first_part * params.slice;
  const long long last = kPass == kFused ? params.cols : min(end_part * params.slice, params.cols);
  const long long end = exists ? last : 0;
  State* partial = static_cast<State*>(params.partial) + (exists ? row : 0) * params.parts;

  State total = State::identity();
  Part kept{};  // of the first tile
  Items first[kItems];
  int done = 0;  // parts
  if constexpr (kPass != kNormalize) {
    const int tiles = static_cast<int>(params.slice / (kAhead * kStep));  // per part, of kAhead items
    State all = State::identity();                                        // of the parts that this thread merges
    Part part = Part::identity();
    long long tile = begin;
    int left = tiles;
    if (first_part == 0) {
      // The first tile of the row, which stays.
      load_steps<false>(op, first, begin + thread, kStep, end);
      kept = part = op.template accumulate<1>(first, items_inside<kItems>(end - thread, kStep), part);
      tile += kItems * kStep;
      left -= kItems / kAhead;
    }
    // What this thread's elements of a part add to its sum, without the part's maximum (RestState).
    const auto rest = [&](auto m, long long col, long long end_col) {
      auto sum = m - m;
      if (!Op::kReduces && col == 0) {
        sum += op.template rest<true>(first, items_inside<kItems>(end - thread, kStep), m, kept);
        col += kItems * kStep;
      }
#pragma unroll 1
      for (; col < end_col; col += kStep) {
        Items items[1];
        load_steps<false>(op, items, col + thread, kStep, end);
        sum += op.template rest<false>(items, 1, m);
      }
      return sum;
    };
    // The other tiles, equally many for every row of the block; rows of one part are merged below.
    for (; tile < last; tile += kAhead * kStep) {
      Items items[kAhead];
      load_steps<false>(op, items, tile + thread, kStep, end);
      const int used = items_inside<kAhead>(end - tile - thread, kStep);
      part = part.extend(op.template accumulate<1>(items, used, part), op.unit);
      if (kOnePart || (kPass == kFused && params.parts == 1)) continue;
      if (--left > 0 && tile + kAhead * kStep < last) continue;
      const int merges = (first_part + done) % kStep;  // the threads that keep the part
      const long long from = begin + done * params.slice, to = tile + kAhead * kStep;
      total =
          State::template of_group<kPlaces, kLanes, false>(part, op.unit, [&](auto m) { return rest(m, from, to); });
      total = column_merge<kLanes, kThreads>(total, op.unit, done, merges);
      if constexpr (kPass == kReduce) {
        if (thread == merges && exists) store_state(partial + (first_part + done), total);
      } else if (thread == merges) {
        all = all.merge(total, op.unit);
      }
      part = Part::identity();
      left = tiles;
      ++done;
    }
    if constexpr (kPass == kReduce) return;
    if (kOnePart || params.parts == 1) {
      total = State::template of_group<kPlaces, kLanes, false>(part, op.unit, [&](auto m) { return rest(m, 0, end); });
    } else {
      total = all.template merge_group<kPlaces, kLanes>(op.unit);
    }
  } else {
    for (long long i = thread; i < params.parts; i += kStep) {
      total = total.merge(load_state(partial + i), op.unit);
    }
    total = total.template merge_group<kPlaces, kLanes>(op.unit);
  }
  total = column_merge<kLanes, kThreads>(total, op.unit, done);

  if (thread == 0 && exists && first_part == 0) op.store_stat(total, row);
  if constexpr (Op::kReduces) return;

  // Normalise: first the tile that stayed, or that is read again in the same two steps; then the others.
  long long behind = begin;
  if (first_part == 0) {
    if constexpr (kPass == kNormalize) {
      load_steps<true>(op, first, begin + thread, kStep, end);
      kept = op.template accumulate<1>(first, items_inside<kItems>(end - thread, kStep), Part::identity());
    }
    op.finish(kept, total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.settle(first[i]);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.template store<false>(first[i], begin + thread + i * kStep, begin, end);
    behind += kItems * kStep;
  }
  op.finish(total, total);
  for (long long tile = behind; tile < end; tile += kAhead * kStep) {
    Items items[kAhead];
    load_steps<true>(op, items, tile + thread, kStep, end);
    const int used = items_inside<kAhead>(end - tile - thread, kStep);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < used) op.prepare(items[i], total);
      op.template store<false>(items[i], tile + thread + i * kStep, begin, end);
    }
  }
}
