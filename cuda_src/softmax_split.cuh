// Rows of any length, shared by `splits` blocks: a first launch reduces, a second one reads again, normalises and
// writes.
//
//   kReduce     (m, l) of a slice: m = max(t), l = sum(exp(t - m)), one rescale a tile
//   kNormalize  (m, l) of the row from those of its slices, then y = exp(t - m) / l of a slice
//
// The partial states are merged in one order by every block, so all slices of a row are scaled alike. Block b has slice
// b % splits of row group b / splits; a block holds kRowsPerBlock rows (1 unless a row is at most a warp, then splits =
// 1). Slices begin on fragment boundaries of x. Shared memory: one state a warp.
//
// Milakov & Gimelshein, arXiv:1805.02867, algorithm 3 (each thread) and section 3.1 (the merge).
#pragma once

#include <primitives/block.cuh>
#include <primitives/softmax_ops.cuh>

template <class Op, SoftmaxPass kPass, int kThreadsPerRow, int kRowsPerBlock, int kFragments>
__global__ void __launch_bounds__(kThreadsPerRow* kRowsPerBlock, 1)
    softmax_split(const __grid_constant__ typename Op::Params params) {
  constexpr int kGroup = kThreadsPerRow < 32 ? kThreadsPerRow : 32;
  constexpr int kWarpsPerRow = kThreadsPerRow / kGroup;
  constexpr int kStep = kThreadsPerRow * Op::kVec;
  static_assert(kThreadsPerRow * kRowsPerBlock % 32 == 0, "collectives need whole warps");
  static_assert(kRowsPerBlock == 1 || kWarpsPerRow == 1, "a block merges the warps of one row");
  using State = typename Op::State;

  // Row and slice of this thread. Threads past the last row own no column but take part in every collective.
  const int thread = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const long long split = blockIdx.x % splits;
  const long long row = static_cast<long long>(blockIdx.x / splits) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);
  const long long slice_start = split * params.slice - op.past_boundary();
  const long long begin = slice_start > 0 ? slice_start : 0;
  const long long slice_end = slice_start + params.slice;
  const long long end = !exists ? 0 : slice_end < params.cols ? slice_end : params.cols;

  State* partial = static_cast<State*>(params.partial) + (exists ? row : 0) * splits;
  State total = State::identity();
  if constexpr (kPass == kNormalize) {
    // Merge the states of the row's slices.
    for (long long i = thread; i < splits; i += kThreadsPerRow) total = total.merge(ptx::ld_global(partial + i));
    total = total.template merge_group<kGroup>();
    if constexpr (kWarpsPerRow > 1) total = block_merge<kWarpsPerRow>(total);
    op.finish(total, total);
  }

  // Walk over the slice, a tile of kFragments loads in flight.
  for (long long tile = slice_start; tile < end; tile += kStep * kFragments) {
    const long long first_col = tile + thread * Op::kVec;
    typename Op::template Items<Op::kVec> items[kFragments];
    load_tile<kPass == kNormalize, kStep, Op::kVec, kFragments>(op, items, first_col, begin, end);
    const long long inside = (end - first_col + kStep - 1) / kStep;  // fragments that begin inside the slice
    const int used = inside < kFragments ? static_cast<int>(inside) : kFragments;
    if constexpr (kPass == kReduce) {
      total = total.extend(op.template accumulate<1>(items, used, total));
    } else {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        if (i < used) op.prepare(items[i], total);
        op.template store<kThreadsPerRow % 32 == 0>(items[i], first_col + i * kStep, begin, end);
      }
    }
  }

  if constexpr (kPass == kReduce) {
    total = total.template merge_group<kGroup>();
    if constexpr (kWarpsPerRow > 1) total = block_merge<kWarpsPerRow>(total);
    if (thread == 0 && exists) {
      if (params.partial) {
        ptx::st_global(partial + split, total);
      } else {
        op.store_stat(total, row);
      }
    }
  } else if (thread == 0 && exists && split == 0) {
    op.store_stat(total, row);
  }
}
