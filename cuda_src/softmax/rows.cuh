// Rows that fit into registers: one read, one write.
//
//   m = max(t), l = sum(exp(t - m)), y = exp(t - m) / l        t = scale * x, or the backward sums
//
// kThreadsPerRow threads of each of kClusterSize blocks hold one row: part of a warp, a warp, a block, or a cluster of
// blocks; a block holds kRowsPerBlock rows (1 unless a row takes at most a warp). Fragment i of thread j of a row
// covers columns (i * kThreadsPerRow * kClusterSize + j) * kVec - past ..., `past` being the row's own distance from a
// 16-byte boundary. So the order of every sum depends on the threads of a row, not on how they are spread over blocks.
// Grid: ceil(rows / kRowsPerBlock) * kClusterSize blocks. Shared memory: that of RowMerge.
//
// Milakov & Gimelshein, arXiv:1805.02867, algorithm 3, with the maximum of the warp known before its first exponential.
#pragma once

#include <primitives/block.cuh>
#include <softmax/backward.cuh>

template <class Op, int kThreadsPerRow, int kRowsPerBlock, int kFragments, int kClusterSize>
__global__ void __launch_bounds__(kThreadsPerRow* kRowsPerBlock, 1) CLUSTER_DIMS(kClusterSize)
    softmax_rows(const __grid_constant__ typename Op::Params params) {
  constexpr int kGroup = kThreadsPerRow < 32 ? kThreadsPerRow : 32;
  constexpr int kWarpsPerRow = kThreadsPerRow / kGroup;
  constexpr int kStep = kThreadsPerRow * kClusterSize * Op::kVec;  // columns from one fragment of a thread to the next
  static_assert(kThreadsPerRow * kRowsPerBlock % 32 == 0, "collectives need whole warps");
  static_assert(kRowsPerBlock == 1 || kWarpsPerRow == 1, "a block merges the warps of one row");
  static_assert(kWarpsPerRow > 1 || kClusterSize == 1, "a cluster merges warps of blocks");
  using State = typename Op::State;
  using Part = typename Op::Part;
  using Merge = RowMerge<kClusterSize, kWarpsPerRow, State>;

  // Row and place of this thread. Threads past the last row own no column but take part in every collective.
  const int cta_rank = kClusterSize > 1 ? ptx::cluster_ctarank() : 0;
  const int thread = cta_rank * kThreadsPerRow + static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const long long row =
      static_cast<long long>(blockIdx.x / kClusterSize) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const int cols = row < params.rows ? static_cast<int>(params.cols) : 0;
  Op op(params, row < params.rows ? row : 0);
  const int first_col = thread * Op::kVec - op.past_boundary();

  if constexpr (kClusterSize > 1) Merge::begin();

  // Load the row, all of it before the first use.
  typename Op::template Items<Op::kVec> items[kFragments];
  load_tile<true, kStep, Op::kVec, kFragments>(op, items, first_col, 0, cols);

  // Reduce: lanes, warps, blocks.
  const int used = (cols - first_col + kStep - 1) / kStep;  // fragments that begin inside the row
  const Part part = op.template accumulate<kGroup>(items, used, Part::identity());
  State total = State::template of_group<kGroup, 1, true>(
      part, op.unit, [&](auto m) { return op.template rest<true>(items, used, m, part); });
  if constexpr (kWarpsPerRow > 1) total = Merge::merge(total, op.unit);

  // Scale and store.
  op.finish(part, total);
#pragma unroll
  for (int i = 0; i < kFragments; ++i) op.settle(items[i]);
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    op.template store<kThreadsPerRow % 32 == 0>(items[i], first_col + i * kStep, 0, cols);
  }
  if (thread == 0 && cols > 0) op.store_stat(total, row);
}
