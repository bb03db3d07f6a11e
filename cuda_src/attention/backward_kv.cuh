// dK and dV of a block of keys, queries in tiles (attention/backward.cuh has the formulas).
//
//   K, V -> shared memory
//   for each query head that shares them, each tile of queries that see a key of the block:
//     S^T = K Q^T;  dP^T = V dO^T
//     P^T = exp(S^T - lse);  dS^T = P^T (dP^T - D), both 0 where hidden
//     dV += P^T dO;  dK += (dS^T chain) Q
//   dK = scale dK
//
// Rows of a warp are keys: so P^T and dS^T are left where the second products want them, and nothing but loads touches
// shared memory. A slot of the ring has Q, dO and the statistics of a tile. A block has kKeyColumns columns of dK,
// which are all or none, and kValueColumns of dV likewise; where one is none, blocks share the columns of the other.
// Padding is zeros in shared memory, keys that a query does not see have P = dS = 0 whatever they hold.
#pragma once

#include <attention/backward.cuh>

template <class Op, int kWarps, int kMTiles, int kQueries, int kDim, int kValueDim, int kKeyColumns, int kValueColumns,
          int kSlots, bool kVector, bool kModified, class Bias, bool kMasked, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_backward_kv(const __grid_constant__ AttentionBackwardParams params) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Stats = RowStats<Acc>;
  constexpr int kThreads = 32 * kWarps, kKeys = 16 * kWarps * kMTiles, kNTiles = kQueries / 8;
  constexpr bool kHasKeys = kKeyColumns > 0, kHasValues = kValueColumns > 0;
  static_assert(!kHasKeys || !kHasValues || (kKeyColumns == kDim && kValueColumns == kValueDim), "both: all columns");
  using KTile = Tile<T, kKeys, kDim>;
  using VTile = Tile<T, kKeys, kValueDim>;
  using QTile = Tile<T, kQueries, kDim>;
  using GradTile = Tile<T, kQueries, kValueDim>;
  constexpr int kSlot = kQueries * (kDim + kValueDim);  // elements, without the statistics

  const AttentionParams& a = params.attention;
  const int kv_heads = a.heads / a.sharing, units = a.cu_seqlens_k != nullptr ? kv_heads : a.batch * kv_heads;
  const unsigned int blocks = static_cast<unsigned int>(units) * a.row_blocks;
  const int part = static_cast<int>(blockIdx.x / blocks);
  KeyBlock block;
  if (!find_key_block(a, kKeys, units, blockIdx.x % blocks, block)) return;
  const long long batch = a.cu_seqlens_k != nullptr ? 0 : block.batch, k_head = block.head;
  const long long first_key = block.k_start + block.first;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int warp_row = warp * 16 * kMTiles, left = block.kv_len - block.first, rows = block.k_rows - block.first;
  const KeyBlock::Queries queries = block.queries<kQueries>(kKeys);
  const int steps = queries.tiles * a.sharing;

  T* smem = ptx::dynamic_smem<T>();
  const KTile k_tile{smem};
  const VTile v_tile{smem + kKeys * kDim};
  T* ring = smem + kKeys * (kDim + kValueDim);
  Stats* ring_stats = reinterpret_cast<Stats*>(ring + kSlots * kSlot);

  // A step is a tile of queries of a head of the group; `next` is the one to be loaded.
  struct Place {
    int head, query;
    __device__ __forceinline__ void advance(const KeyBlock::Queries& queries) {
      query += kQueries;
      if (query < queries.first + queries.tiles * kQueries) return;
      query = queries.first;
      ++head;
    }
  };
  const int first_head = block.head * a.sharing;
  const T* q = row_of<const T>(a.q, a.q_stride, batch, first_head, block.q_start);
  const T* grad = row_of<const T>(params.grad, params.grad_stride, batch, first_head, block.q_start);
  const Stats* stats =
      static_cast<const Stats*>(params.stats) + stats_row(params, batch, first_head, block.batch, block.q_start, 0);
  Place next{0, queries.first};
  const auto load = [&](int step) {
    if (step < steps) {
      const int from = queries.begin - next.query, to = queries.end - next.query;
      T* slot = ring + step % kSlots * kSlot;
      QTile{slot}.template load<kVector, kThreads>(q + next.head * a.q_stride[1] + next.query * a.q_stride[2],
                                                   a.q_stride[2], a.q_stride[3], from, to, a.head_dim);
      GradTile{slot + kQueries * kDim}.template load<kVector, kThreads>(
          grad + next.head * params.grad_stride[1] + next.query * params.grad_stride[2], params.grad_stride[2],
          params.grad_stride[3], from, to, a.value_dim);
      constexpr int kTogether = 16 / sizeof(Stats);
      static_assert(kQueries <= kThreads * kTogether, "one copy for each thread");
      if (const int i = static_cast<int>(threadIdx.x) * kTogether; i < kQueries) {
        ptx::cp_async_16(ring_stats + step % kSlots * kQueries + i,
                         stats + next.head * params.stat_rows + next.query + i,
                         i + kTogether > from && i < to ? 16 : 0);
      }
      next.advance(queries);
    }
    ptx::cp_async_commit();  // one group per step, empty at the end, so that waits can count them
  };
  if (steps > 0) {  // K and V land with the first group
    k_tile.template load<kVector, kThreads>(row_of<const T>(a.k, a.k_stride, batch, k_head, first_key), a.k_stride[2],
                                            a.k_stride[3], 0, left, a.head_dim);
    if constexpr (kHasKeys) {
      v_tile.template load<kVector, kThreads>(row_of<const T>(a.v, a.v_stride, batch, k_head, first_key), a.v_stride[2],
                                              a.v_stride[3], 0, left, a.value_dim);
    }
  }
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) load(step);

  const Acc scale = static_cast<Acc>(a.scale), fold = ScoreBase<Acc>::kUnit * (kModified ? Acc(1) : scale);
  const int key0 = block.first + warp_row + lane / 4;  // of fragment element 0; elements 2 and 3 are 8 further down
  Acc dk[kMTiles][kHasKeys ? kKeyColumns / 8 : 1][4] = {}, dv[kMTiles][kHasValues ? kValueColumns / 8 : 1][4] = {};
  Acc unused[kMTiles][2] = {};
  const auto compute = [&](int step, Place place, auto edge) {
    constexpr bool kEdge = decltype(edge)::kValue;
    const QTile q_tile{ring + step % kSlots * kSlot};
    const GradTile grad_tile{q_tile.base + kQueries * kDim};
    const Stats* tile_stats = ring_stats + step % kSlots * kQueries;
    const ScoreRule<kModified, Bias, kMasked, Acc, Score> rule(a, block, first_head + place.head);
    // S^T = K Q^T;  dP^T = V dO^T
    Acc p[kMTiles][kNTiles][4] = {}, ds[kMTiles][kNTiles][4] = {};
    Op::template scores<kDim>(p, k_tile, warp_row, q_tile);
    if constexpr (kHasKeys) Op::template scores<kValueDim>(ds, v_tile, warp_row, grad_tile);

    // P^T = exp(S^T - lse);  dS^T = P^T (dP^T - D), both 0 where hidden
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 8 * n + lane % 4 * 2 + e, query = place.query + c;
        const Stats own = ptx::ld_shared(tile_stats + c);
        const Acc lse = own.lse * (kModified ? Acc(1) : ScoreBase<Acc>::kUnit);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int key = key0 + 16 * i + 8 * half;
            bool visible = !kEdge || (query >= block.first_query(key) && query < block.last_query(key));
            if constexpr (kMasked) visible = visible && query < block.q_len && rule.allowed(query, key);
            ScoreChain<Acc> chain;
            Acc &weight = p[i][n][2 * half + e], &d = ds[i][n][2 * half + e];
            weight = probability<kModified>(rule.template score<true>(weight, query, key, chain), fold, lse);
            weight = visible ? weight : Acc(0);
            d = visible ? weight * (d - own.delta) * chain.score * chain.cap : Acc(0);
          }
        }
      }
    }
    // dV += P^T dO;  dK += (dS^T chain) Q
    if constexpr (kHasValues) {
      Op::values(dv, unused, p, GradTile{grad_tile.base + (kHasKeys ? 0 : part * kValueColumns)});
    }
    if constexpr (kHasKeys) Op::values(dk, unused, ds, QTile{q_tile.base + (kHasValues ? 0 : part * kKeyColumns)});
  };
  Place place{0, queries.first};
  for (int step = 0; step < steps; ++step, place.advance(queries)) {
    if constexpr (kSlots == 1) {
      __syncthreads();  // every warp has read the last tile
      load(step);
    }
    ptx::cp_async_wait<(kSlots > 1 ? kSlots - 2 : 0)>();
    __syncthreads();  // every thread's part of this tile; and every warp has read the last one
    if constexpr (kSlots > 1) load(step + kSlots - 1);
    if (place.query >= queries.all_begin && place.query + kQueries <= queries.all_end) {
      compute(step, place, Constant<false>());
    } else {
      compute(step, place, Constant<true>());
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // nothing is in flight, and every warp has read its last tile: dK and dV take the place of K and V
  if constexpr (kHasKeys) {  // dK = scale dK
    const int column = kHasValues ? 0 : part * kKeyColumns;
    store_gradient(dk, scale, Tile<T, kKeys, kKeyColumns>{smem}, warp_row, left, rows,
                   row_of<T>(params.dk, params.dk_stride, batch, k_head, first_key) + column * params.dk_stride[3],
                   params.dk_stride[2], params.dk_stride[3], min(kKeyColumns, a.head_dim - column),
                   params.dk_is_vector);
  }
  if constexpr (kHasValues) {
    const int column = kHasKeys ? 0 : part * kValueColumns;
    store_gradient(dv, Acc(1), Tile<T, kKeys, kValueColumns>{v_tile.base}, warp_row, left, rows,
                   row_of<T>(params.dv, params.dv_stride, batch, k_head, first_key) + column * params.dv_stride[3],
                   params.dv_stride[2], params.dv_stride[3], min(kValueColumns, a.value_dim - column),
                   params.dv_is_vector);
  }
}
