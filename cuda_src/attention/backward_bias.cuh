// dbias, in the shape of the bias: dS, added up over what shares a value (attention/backward.cuh has the formulas).
//
//   for each batch and head that share the block's part of the bias, and where its rows or columns are one, each tile
//   of them:
//     S = Q K^T;  dP = dO V^T;  P = exp(S - lse);  sum += P (dP - D) where visible
//   dbias = sum, over all its rows or columns where they are one
//
// A block has 16 kWarps rows and kKeys columns of one matrix of the bias, or all rows or columns if they are one: it
// adds in one order, whatever else runs. Tiles are not loaded ahead.
#pragma once

#include <attention/backward.cuh>

template <class Op, int kWarps, int kKeys, int kDim, int kValueDim, bool kVector, class Bias, bool kMasked, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_backward_bias(const __grid_constant__ AttentionBackwardBiasParams params) {
  using Acc = typename Op::Acc;
  using Stats = RowStats<Acc>;
  constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps, kNTiles = kKeys / 8;
  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const bool one_row = params.rows == 1, one_col = params.cols == 1;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index()), warp_row = 16 * warp;

  // Columns, rows, head and batch of the bias.
  int index = static_cast<int>(blockIdx.x);
  const int own_col = index % params.col_blocks * kKeys;
  index /= params.col_blocks;
  const int own_row = index % params.row_blocks * kRows;
  index /= params.row_blocks;
  const int own_head = index % params.heads, own_batch = index / params.heads;
  const int batch_end = params.batches == 1 ? a.batch : own_batch + 1;
  const int head_end = params.heads == 1 ? a.heads : own_head + 1;

  const ScoreTile<Op, kWarps, kKeys, kDim, kValueDim, kVector> tile{ptx::dynamic_smem<typename Op::Element>()};
  Acc sum[kNTiles][4] = {};
  QueryBlock block{};  // of the step
  const auto add = [&](const QueryBlock::Keys& keys, int key) {
    const long long batch = a.cu_seqlens_q != nullptr ? 0 : block.batch;
    Acc s[1][kNTiles][4] = {}, dp[1][kNTiles][4] = {};
    tile.multiply(p, block, keys, key, s, dp);
    const ScoreRule<true, Bias, kMasked, Acc, Score> rule(a, block, block.head);
    const Stats* stats =
        static_cast<const Stats*>(p.stats) + stats_row(p, batch, block.head, block.batch, block.q_start, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.first + warp_row + lane / 4 + 8 * half;
      if (row >= block.q_len) continue;
      const int low = block.low(row), high = block.high(row);
      const Stats own = ptx::ld_global(stats + row);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int col = key + 8 * n + lane % 4 * 2 + e;
          if (col < low || col >= high || (kMasked && !rule.allowed(row, col))) continue;
          ScoreChain<Acc> chain;
          const Acc score = rule.template score<true>(s[0][n][2 * half + e], row, col, chain);
          const Acc weight = probability<true>(score, ScoreBase<Acc>::kUnit, own.lse);
          sum[n][2 * half + e] += weight * (dp[0][n][2 * half + e] - own.delta) * chain.score;
        }
      }
    }
  };
  for (block.batch = own_batch; block.batch < batch_end; ++block.batch) {
    find_sequence(a, block);
    for (block.head = own_head; block.head < head_end; ++block.head) {
      for (block.first = own_row; block.first < (one_row ? block.q_len : own_row + 1); block.first += kRows) {
        if (block.first >= block.q_len) break;
        const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
        const int begin = one_col ? keys.first : max(own_col, keys.first);
        const int end = one_col ? keys.end : min(own_col + 1, keys.end);
        for (int key = begin; key < end; key += kKeys) add(keys, key);  // the same for every thread
      }
    }
  }

  // The sums of the block, then over its rows and its columns where these are one.
  Acc* sums = reinterpret_cast<Acc*>(tile.smem);  // [kRows][kKeys]
  __syncthreads();                                // every warp has read the last tiles
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = warp_row + lane / 4 + e / 2 * 8, col = 8 * n + lane % 4 * 2 + e % 2;
      ptx::st_shared(sums + row * kKeys + col, sum[n][e]);
    }
  }
  __syncthreads();  // all sums, before any thread adds them up
  if (one_row) {
    for (int col = static_cast<int>(threadIdx.x); col < kKeys; col += kThreads) {
      Acc total = 0;
      for (int row = 0; row < kRows; ++row) total += ptx::ld_shared(sums + row * kKeys + col);
      ptx::st_shared(sums + col, total);
    }
    __syncthreads();  // the totals of all columns
  }
  const int rows = one_row ? 1 : min(kRows, params.rows - own_row);
  if (one_col) {
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += kThreads) {
      Acc total = 0;
      for (int col = 0; col < kKeys; ++col) total += ptx::ld_shared(sums + row * kKeys + col);
      ptx::st_shared(sums + row * kKeys, total);  // which the same thread stores
    }
  }
  const int cols = one_col ? 1 : min(kKeys, params.cols - own_col);
  Bias* out = row_of<Bias>(params.dbias, params.dbias_stride, own_batch, own_head, own_row);
  for (int i = static_cast<int>(threadIdx.x); i < rows * cols; i += kThreads) {
    const Acc total = ptx::ld_shared(sums + i / cols * kKeys + i % cols);
    ptx::st_global(out + i / cols * params.dbias_stride[2] + (own_col + i % cols) * params.dbias_stride[3],
                   from_acc<Bias>(total));
  }
}
