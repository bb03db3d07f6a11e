// Ragged rows: segment i is x[offsets[i]:offsets[i + 1]] of the reduced axis; each of its segment_width columns is a
// row.
//
// A block of kWarps warps has kLanes neighbouring rows along threadIdx.x; 32 / kLanes lanes of a warp walk down each.
// The first warp computes rows that fit into its registers, kItems elements per lane. A longer row has kShares shares,
// which the warps of the block take one after the other: so the order of its sum depends on its own length only, while
// kWarps follows the mean length of all rows. The first tile of a warp stays in registers; the rest is read twice.
// Shared memory: kShares * kLanes states.
#pragma once

#include <softmax/backward.cuh>
#include <softmax/columns.cuh>

template <class Op, class Offset, int kLanes, int kWarps, int kItems>
__global__ void __launch_bounds__(32 * kWarps, 1) softmax_segments(const __grid_constant__ typename Op::Params params) {
  constexpr int kShares = 8;
  constexpr int kPlaces = 32 / kLanes;                 // lanes per row and warp
  constexpr int kAhead = kItems > 1 ? kItems / 2 : 1;  // items in flight beyond the first tile
  static_assert(kShares % kWarps == 0, "all warps have as many shares");
  using State = typename Op::State;
  using Items = typename Op::template Items<1>;

  // Row and place of this thread. Threads past the last row own no column but take part in every collective.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long long row = static_cast<long long>(blockIdx.x) * kLanes + lane % kLanes;
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);

  // Whatever the offsets hold, the segment stays inside x.
  const Offset* offset = static_cast<const Offset*>(params.offsets) + (exists ? row / params.segment_width : 0);
  const long long begin = min(max(static_cast<long long>(ptx::ld_global(offset)), 0LL), params.cols);
  const long long end =
      exists ? min(max(static_cast<long long>(ptx::ld_global(offset + 1)), begin), params.cols) : begin;
  const bool shared = end - begin > kItems * kPlaces;
  const int step = shared ? kShares * kPlaces : kPlaces;            // columns from one item of a thread to the next
  const int shares = __any_sync(0xffffffff, shared) ? kShares : 1;  // every warp sees the same rows
  const auto first_of = [&](int share) {                            // the first column that this thread has of a share
    return share > 0 && !shared ? end : begin + share * kPlaces + lane / kLanes;
  };

  // Reduce share by share.
  State* slots = ptx::static_smem<State, kShares * kLanes>();
  State total = State::identity();
  State kept{};  // of the first tile
  Items first[kItems];
  for (int share = warp; share < shares; share += kWarps) {
    const long long first_col = first_of(share);
    total = State::identity();
    if (share == warp) {
      load_steps<false>(op, first, first_col, step, end);
      kept = total = op.template accumulate<1>(first, items_inside<kItems>(end - first_col, step), total);
    } else {
      Items items[kItems];
      load_steps<false>(op, items, first_col, step, end);
      total =
          total.extend(op.template accumulate<1>(items, items_inside<kItems>(end - first_col, step), total), op.unit);
    }
    for (long long skipped = kItems; __any_sync(0xffffffff, first_col + skipped * step < end); skipped += kAhead) {
      const long long col = first_col + skipped * step;
      Items items[kAhead];
      load_steps<false>(op, items, col, step, end);
      total = total.extend(op.template accumulate<1>(items, items_inside<kAhead>(end - col, step), total), op.unit);
    }
    total = total.template merge_group<kPlaces, kLanes>(op.unit);
    if (shares > 1 && lane < kLanes) store_shared_state(slots + share * kLanes + lane, total);
  }
  if (shares > 1) {
    __syncthreads();  // the states of all shares are written before any warp reads them
    total = merge_slots<kLanes, kShares>(slots, op.unit);
  } else if (warp > 0) {
    return;
  }

  // Normalise: first the tile that stayed, or that is read again in the same two steps; then the others.
  for (int share = warp; share < shares; share += kWarps) {
    const long long first_col = first_of(share);
    if (share != warp) {
      load_steps<false>(op, first, first_col, step, end);
      kept = op.template accumulate<1>(first, items_inside<kItems>(end - first_col, step), State::identity());
    }
    op.finish(kept, total);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.settle(first[i]);
#pragma unroll
    for (int i = 0; i < kItems; ++i) op.template store<false>(first[i], first_col + i * step, begin, end);
    op.finish(total, total);
    for (long long done = kItems; first_col + done * step < end; done += kAhead) {
      const long long col = first_col + done * step;
      Items items[kAhead];
      load_steps<false>(op, items, col, step, end);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        op.prepare(items[i], total);
        op.template store<false>(items[i], col + i * step, begin, end);
      }
    }
  }
}
