// Gradients of what a score expression looks up at some place, added up by the distance of query and key, on which the
// place depends (attention/backward.cuh has the formulas).
//
//   for each tile of a diagonal of tiles (attention/distances.cuh):
//     S = Q K^T;  dP = dO V^T;  P = exp(S - lse);  dE = P (dP - D) o dS/dE where visible
//     sum += dE along the diagonals of the tile
//
// A block has one diagonal of tiles of a head, a thread one of its distances: it adds in one order, whatever else runs.
// Score: the expression with its derivative by the element E. Tiles are not loaded ahead.
#pragma once

#include <attention/distances.cuh>

template <class Op, int kWarps, int kKeys, int kDim, int kValueDim, bool kVector, class Bias, bool kMasked, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_backward_score(const __grid_constant__ AttentionBackwardScoreParams params) {
  using Acc = typename Op::Acc;
  constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps, kNTiles = kKeys / 8;
  static_assert(kThreads == 2 * kRows && kRows % kKeys == 0, "a thread has a distance of a diagonal of tiles");
  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index()), warp_row = 16 * warp;
  Diagonal own;
  if (!find_diagonal(a, params.slots, params.log2, blockIdx.x, own)) return;
  QueryBlock& block = own.block;
  const long long batch = a.cu_seqlens_q != nullptr ? 0 : block.batch;

  const ScoreTile<Op, kWarps, kKeys, kDim, kValueDim, kVector> tile{ptx::dynamic_smem<typename Op::Element>()};
  Acc* changes = reinterpret_cast<Acc*>(tile.smem);  // dE [kRows][kKeys], in its place
  const ScoreRule<true, Bias, kMasked, Acc, Score> rule(a, block, block.head);
  const RowStats<Acc>* stats =
      static_cast<const RowStats<Acc>*>(p.stats) + stats_row(p, batch, block.head, block.batch, block.q_start, 0);

  Acc sum = 0;  // of what lies threadIdx.x - (kRows - 1) rows below the middle of the diagonal
  // Of the queries from block.first on, and the keys from `key` on, `behind` the first one that the diagonal has there.
  const auto add = [&](const QueryBlock::Keys& keys, int key, int behind) {
    Acc s[1][kNTiles][4] = {}, dp[1][kNTiles][4] = {};
    tile.multiply(p, block, keys, key, s, dp);
    __syncthreads();  // every warp has read the tile: dE takes its place
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int tile_row = warp_row + lane / 4 + 8 * half, row = block.first + tile_row;
      const bool good = row < block.q_len;
      const int low = good ? block.low(row) : 0, high = good ? block.high(row) : 0;
      const RowStats<Acc> of_row = good ? ptx::ld_global(stats + row) : RowStats<Acc>{};
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int tile_col = 8 * n + lane % 4 * 2 + e, col = key + tile_col;
          Acc de = 0;
          if (col >= low && col < high && (!kMasked || rule.allowed(row, col))) {
            ScoreChain<Acc> chain;
            const Acc score = rule.template score<true>(s[0][n][2 * half + e], row, col, chain);
            const Acc weight = probability<true>(score, ScoreBase<Acc>::kUnit, of_row.lse);
            const Acc ds = weight * (dp[0][n][2 * half + e] - of_row.delta);
            de = ds == 0 || chain.score == 0 ? Acc(0) : ds * chain.score;
          }
          ptx::st_shared(changes + tile_row * kKeys + tile_col, de);
        }
      }
    }
    __syncthreads();  // dE is whole
    // Row minus column, of lane 0 and of this one. Lanes read neighbouring columns.
    const int first = 32 * warp - (kRows - 1) + behind, diagonal = first + lane;
    for (int row = max(first, 0); row < min(kRows, first + 31 + kKeys); ++row) {
      const int col = row - diagonal;
      if (col >= 0 && col < kKeys) sum += ptx::ld_shared(changes + row * kKeys + col);
    }
  };
  for (block.first = 0; block.first < block.q_len; block.first += kRows) {
    const long long start = block.first + own.shift - static_cast<long long>(own.number) * kRows;
    if (start >= block.kv_len) break;  // the next ones begin further on
    const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
    for (int behind = 0; behind < kRows; behind += kKeys) {  // the same for every thread
      const long long key = start + behind;
      if (key + kKeys > keys.begin && key < keys.end) add(keys, static_cast<int>(key), behind);
    }
  }

  Acc* sums = static_cast<Acc*>(params.sums);
  if (params.by_distance) {
    ptx::st_global(sums + static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x, sum);
    return;
  }
  sum = group_sum<32>(sum);
  Acc* of_warps = ptx::static_smem<Acc, kWarps>();
  if (lane == 0) ptx::st_shared(of_warps + warp, sum);
  __syncthreads();  // the sums of all warps
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kWarps; ++i) sum += ptx::ld_shared(of_warps + i);
  ptx::st_global(sums + blockIdx.x, sum);
}
