// What the baselines share: their parameters, and reductions over the block that owns a row.
#pragma once

#include <primitives/block.cuh>
#include <primitives/softmax_state.cuh>

constexpr int kThreads = 256;  // per block, which owns one row, as in the paper
constexpr int kWarps = kThreads / 32;
constexpr float kUnit = 1;  // of scores

struct RowParams {
  const float* x;  // [rows, cols]
  float* y;        // [rows, cols], or [rows, k] of a top-k
  int* index;      // [rows, k] of a top-k
  long long cols;
};

struct MaxState {
  float m;

  template <int kGroup>
  __device__ __forceinline__ MaxState merge_group(float) const {
    return {group_max<kGroup>(m)};
  }
};

// Merges the states of all threads of the block; every thread gets the result. At most once per type of state: what
// block_merge keeps in shared memory is not free again before the kernel ends.
template <class State>
__device__ __forceinline__ State reduce_block(State state) {
  return block_merge<kWarps>(state.template merge_group<32>(kUnit), kUnit);
}
