// Which tiles of a mask expression are empty, and which hide nothing.
//
//   for each tile of block_queries x block_keys:
//     kind = (some query sees some key) + (every query sees every key)
//
// A block has a tile, and each of its threads some of the keys; it stops when it has seen both.
#pragma once

#include <attention/expression.cuh>

struct AttentionBlockMaskParams {
  unsigned char* kinds;  // [batch, heads, tile_rows, tile_cols]
  long long batch, heads, tile_rows, tile_cols;
  long long queries, keys;  // of the mask; query 0 is at keys - queries among the keys
  long long block_queries, block_keys;
  ScoreArrays arrays;
};

template <int kThreads, class Mask>
__global__ void __launch_bounds__(kThreads)
    attention_block_mask(const __grid_constant__ AttentionBlockMaskParams params) {
  const long long tiles = params.batch * params.heads * params.tile_rows * params.tile_cols;
  for (long long tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const long long row = tile / params.tile_cols % params.tile_rows;
    const long long head = tile / params.tile_cols / params.tile_rows % params.heads;
    const long long batch = tile / params.tile_cols / params.tile_rows / params.heads;
    const long long i0 = row * params.block_queries, j0 = tile % params.tile_cols * params.block_keys;
    const long long i1 = i0 + params.block_queries < params.queries ? i0 + params.block_queries : params.queries;
    const long long j1 = j0 + params.block_keys < params.keys ? j0 + params.block_keys : params.keys;

    bool some = false, every = true;
    for (long long j = j0 + threadIdx.x; j < j1; j += kThreads) {
      for (long long i = i0; i < i1 && (!some || every); ++i) {
        const bool seen = Mask::seen(batch, head, i + params.keys - params.queries, j, params.arrays);
        some = some || seen;
        every = every && seen;
      }
    }
    some = __syncthreads_or(some);
    every = __syncthreads_and(every);
    if (threadIdx.x == 0) ptx::st_global(params.kinds + tile, static_cast<unsigned char>(some + every));
  }
}
