// Sums of probabilities over the queries, for each key and query head, from q, k and the log-sum-exp of each query.
//
//   K -> shared memory
//   for each query head of the block, all of which share it:
//     for each tile of queries that see a key of the block:
//       S^T = K Q^T
//       P^T = exp(S^T - lse), 0 where hidden
//       c += rowsum P^T
//     c -> global memory
//
// A block has the keys of one tile, a warp 16 kMTiles of them; of the query heads that share them all, or some where
// there are few blocks. Rows of a warp are keys, so that no warp adds to what another one has, and the order in which
// a key is added up is that of the queries. Two slots of a ring have Q and lse of a tile. Padding is zeros in shared
// memory; of a query that sees no key lse is infinite, which makes its P zeros.
#pragma once

#include <attention/backward.cuh>

template <class Op, int kWarps, int kMTiles, int kQueries, int kDim, bool kVector, bool kModified, class Bias,
          bool kMasked>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_column_sums(const __grid_constant__ AttentionColumnSumsParams params) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  constexpr int kThreads = 32 * kWarps, kKeys = 16 * kWarps * kMTiles, kNTiles = kQueries / 8;
  static_assert(kQueries <= kThreads, "a thread has the lse of one query");
  using KTile = Tile<T, kKeys, kDim>;
  using QTile = Tile<T, kQueries, kDim>;

  const AttentionParams& a = params.attention;
  KeyBlock block;
  if (!find_key_block(a, kKeys, a.batch * (a.heads / a.sharing), blockIdx.x, block)) return;
  const int thread = static_cast<int>(threadIdx.x), lane = static_cast<int>(lane_index());
  const int warp_row = thread / 32 * 16 * kMTiles, left = block.kv_len - block.first;
  const int rows = block.k_rows - block.first, first_head = block.head * a.sharing;
  const KeyBlock::Queries queries = block.queries<kQueries>(kKeys);
  const int steps = queries.tiles * a.sharing, last = queries.first + queries.tiles * kQueries;

  T* smem = ptx::dynamic_smem<T>();
  const KTile k_tile{smem};
  T* ring = smem + kKeys * kDim;
  Acc* ring_lse = reinterpret_cast<Acc*>(ring + 2 * kQueries * kDim);

  // A step is a tile of queries of a head. Its lse waits in a register until the step begins.
  const T* q = row_of<const T>(a.q, a.q_stride, block.batch, first_head, 0);
  const Acc* lse = static_cast<const Acc*>(a.lse) + block.batch * a.lse_stride[0] + first_head * a.lse_stride[1];
  constexpr Acc kLseUnit = kModified ? Acc(1) : ScoreBase<Acc>::kUnit;
  Acc next_lse = Limits<Acc>::infinity();
  int next_head = 0, next_query = queries.first;
  const auto load = [&](int step) {
    if (step < steps) {
      const int from = queries.begin - next_query, to = queries.end - next_query;
      QTile{ring + step % 2 * kQueries * kDim}.template load<kVector, kThreads>(
          q + next_head * a.q_stride[1] + next_query * a.q_stride[2], a.q_stride[2], a.q_stride[3], from, to,
          a.head_dim);
      next_lse = Limits<Acc>::infinity();
      if (thread < kQueries && thread >= from && thread < to) {
        const Acc own = ptx::ld_global(lse + next_head * a.lse_stride[1] + (next_query + thread) * a.lse_stride[2]);
        if (own != -Limits<Acc>::infinity()) next_lse = own * kLseUnit;
      }
      next_query += kQueries;
      if (next_query >= last) {
        next_query = queries.first;
        ++next_head;
      }
    }
    ptx::cp_async_commit();
  };
  if (steps > 0) {  // K lands with the first tile
    k_tile.template load<kVector, kThreads>(
        row_of<const T>(a.k, a.k_stride, block.batch, first_head / params.group, block.first), a.k_stride[2],
        a.k_stride[3], 0, left, a.head_dim);
  }
  load(0);

  const Acc fold = ScoreBase<Acc>::kUnit * (kModified ? Acc(1) : static_cast<Acc>(a.scale));
  const int key0 = block.first + warp_row + lane / 4;  // of fragment element 0; elements 2 and 3 are 8 further down
  int step = 0;
  for (int head = 0; head < a.sharing; ++head) {
    const ScoreRule<kModified, Bias, kMasked, Acc> rule(a, block, first_head + head);
    Acc c[kMTiles][2] = {}, lost[kMTiles][2] = {};
    const auto add_tile = [&](int first_query, auto edge) {
      constexpr bool kEdge = decltype(edge)::kValue;
      const QTile q_tile{ring + step % 2 * kQueries * kDim};
      const Acc* tile_lse = ring_lse + step % 2 * kQueries;
      // S^T = K Q^T
      Acc s[kMTiles][kNTiles][4] = {};
      Op::template scores<kDim>(s, k_tile, warp_row, q_tile);

      // P^T = exp(S^T - lse), 0 where hidden
      Acc sum[kMTiles][2] = {};
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int column = 8 * n + lane % 4 * 2 + e, query = first_query + column;
          const Acc own_lse = ptx::ld_shared(tile_lse + column);
#pragma unroll
          for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int key = key0 + 16 * i + 8 * half;
              bool visible = !kEdge || (query >= block.first_query(key) && query < block.last_query(key));
              if constexpr (kMasked) visible = visible && query < block.q_len && rule.allowed(query, key);
              const Acc score = rule.score(s[i][n][2 * half + e], query, key);
              const Acc weight = probability<kModified>(score, fold, own_lse);
              sum[i][half] += visible ? weight : Acc(0);
            }
          }
        }
      }
      // c += rowsum P^T, with what rounding has taken from it (W. Kahan, doi:10.1145/363707.363723)
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Acc more = sum[i][half] - lost[i][half], total = c[i][half] + more;
          lost[i][half] = total - c[i][half] - more;
          c[i][half] = total;
        }
      }
    };
    for (int query = queries.first; query < last; query += kQueries, ++step) {
      if (thread < kQueries) ptx::st_shared(ring_lse + step % 2 * kQueries + thread, next_lse);
      ptx::cp_async_wait<0>();
      __syncthreads();  // every thread's part of this tile; and every warp has read the last one, whose slot is free
      load(step + 1);
      if (query >= queries.all_begin && query + kQueries <= queries.all_end) {
        add_tile(query, Constant<false>());
      } else {
        add_tile(query, Constant<true>());
      }
    }

    // c -> global memory
    Acc* out = static_cast<Acc*>(params.sums) + block.batch * params.sums_stride[0] +
               (first_head + head) * params.sums_stride[1] + block.first * params.sums_stride[2];
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Acc total = group_sum<4>(c[i][half]);
        const int row = warp_row + lane / 4 + 16 * i + 8 * half;
        if (lane % 4 == 0 && row < rows) {
          ptx::st_global(out + row * params.sums_stride[2], row < left ? total : Acc(0));
        }
      }
    }
  }
}
