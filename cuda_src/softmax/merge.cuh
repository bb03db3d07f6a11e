// Merges the partial states of each row, params.partial [rows, parts], into the row's result: one warp per row.
// Grid: ceil(rows / kRowsPerBlock) blocks of 32 * kRowsPerBlock threads. No shared memory.
#pragma once

#include <softmax/logits.cuh>

template <class Op, int kRowsPerBlock>
__global__ void __launch_bounds__(32 * kRowsPerBlock, 1)
    softmax_merge(const __grid_constant__ typename Op::Params params) {
  using State = typename Op::State;
  const int lane = threadIdx.x % 32;
  const long long row = static_cast<long long>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const bool exists = row < params.rows;

  State total = State::identity();
  const Op op(params, exists ? row : 0);
  const State* partial = static_cast<const State*>(params.partial) + (exists ? row : 0) * params.parts;
  for (long long i = lane; i < params.parts; i += 32) total = total.merge(load_state(partial + i), op.unit);
  total = total.template merge_group<32>(op.unit);
  if (exists && lane == 0) op.store_stat(total, row);
}
