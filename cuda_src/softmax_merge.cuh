// Merges the partial states of each row, params.partial [rows, splits], into the row's result: a warp a row.
// Grid: ceil(rows / kRowsPerBlock) blocks of 32 * kRowsPerBlock threads. No shared memory.
#pragma once

#include <primitives/softmax_ops.cuh>

template <class Op, int kRowsPerBlock>
__global__ void __launch_bounds__(32 * kRowsPerBlock, 1)
    softmax_merge(const __grid_constant__ typename Op::Params params) {
  using State = typename Op::State;
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const bool exists = row < params.rows;

  State total = State::identity();
  const State* partial = static_cast<const State*>(params.partial) + (exists ? row : 0) * params.splits;
  for (long long i = lane; i < params.splits; i += 32) total = total.merge(ptx::ld_global(partial + i));
  total = total.template merge_group<32>();

  if (exists && lane == 0) {
    Op op(params, row);
    op.store_stat(total, row);
  }
}
