// dQ of a block of queries, keys in tiles (attention/backward.cuh has the formulas).
//
//   Q, dO -> shared memory
//   for each tile of keys that a row of the block sees:
//     S = Q K^T;  dP = dO V^T
//     P = exp(S - lse);  dS = P (dP - D), 0 where hidden
//     dQ += (dS chain) K
//   dQ = scale dQ;  dslope's share of a row = -sum dS |i + offset - j|
//
// Warps, tiles and options as in attention/forward.cuh, but for the ring: a slot has K and V of a tile. A block has
// kColumns columns of dQ. NaN in K or V that no query sees stays out: such keys are zeros, or in tiles of a mask become
// zeros before the last product; whatever their dP is, their dS is 0.
#pragma once

#include <attention/backward.cuh>

template <class Op, int kWarps, int kMTiles, int kKeys, int kDim, int kValueDim, int kColumns, int kSlots, bool kVector,
          bool kModified, class Bias, bool kMasked, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_backward_q(const __grid_constant__ AttentionBackwardParams params) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Stats = RowStats<Acc>;
  constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps * kMTiles, kNTiles = kKeys / 8;
  static_assert(kKeys <= 64, "a word of 64 bits has a bit for each key");
  static_assert(kColumns == kDim || kColumns * sizeof(T) % 128 == 0, "columns are swizzled 128 bytes at a time");
  using QTile = Tile<T, kRows, kDim>;
  using GradTile = Tile<T, kRows, kValueDim>;
  using KTile = Tile<T, kKeys, kDim>;
  using VTile = Tile<T, kKeys, kValueDim>;
  constexpr int kSlot = kKeys * (kDim + kValueDim);  // elements

  const AttentionParams& a = params.attention;
  const int units = a.cu_seqlens_q != nullptr ? a.heads : a.batch * a.heads;
  const unsigned int blocks = static_cast<unsigned int>(units) * a.row_blocks;
  const int first_column = static_cast<int>(blockIdx.x / blocks) * kColumns;
  QueryBlock block;
  if (!find_block(a, kRows, units, blockIdx.x % blocks, block)) return;
  const long long batch = a.cu_seqlens_q != nullptr ? 0 : block.batch, head = block.head, k_head = head / a.sharing;
  const long long first_row = block.q_start + block.first;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int warp_row = warp * 16 * kMTiles, left = block.q_len - block.first;
  const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
  const int tiles = keys.tiles;

  T* smem = ptx::dynamic_smem<T>();
  const QTile q_tile{smem};
  const GradTile grad_tile{smem + kRows * kDim};
  T* ring = smem + kRows * (kDim + kValueDim);
  const T* k = row_of<const T>(a.k, a.k_stride, batch, k_head, block.k_start);
  const T* v = row_of<const T>(a.v, a.v_stride, batch, k_head, block.k_start);
  const auto load = [&](int step) {
    if (step < tiles) {
      const int key = keys.first + step * kKeys, from = keys.begin - key, to = keys.end - key;
      T* slot = ring + step % kSlots * kSlot;
      KTile{slot}.template load<kVector, kThreads>(k + key * a.k_stride[2], a.k_stride[2], a.k_stride[3], from, to,
                                                   a.head_dim);
      VTile{slot + kKeys * kDim}.template load<kVector, kThreads>(v + key * a.v_stride[2], a.v_stride[2], a.v_stride[3],
                                                                  from, to, a.value_dim);
    }
    ptx::cp_async_commit();  // one group per step, empty at the end, so that waits can count them
  };
  if (tiles > 0) {  // Q and dO land with the first group
    q_tile.template load<kVector, kThreads>(row_of<const T>(a.q, a.q_stride, batch, head, first_row), a.q_stride[2],
                                            a.q_stride[3], 0, left, a.head_dim);
    grad_tile.template load<kVector, kThreads>(row_of<const T>(params.grad, params.grad_stride, batch, head, first_row),
                                               params.grad_stride[2], params.grad_stride[3], 0, left, a.value_dim);
  }
#pragma unroll
  for (int step = 0; step < kSlots - 1; ++step) load(step);

  const ScoreRule<kModified, Bias, kMasked, Acc, Score> rule(a, block, block.head);
  const Acc scale = static_cast<Acc>(a.scale), fold = ScoreBase<Acc>::kUnit * (kModified ? Acc(1) : scale);
  const int row0 = block.first + warp_row + lane / 4;  // of fragment element 0; elements 2 and 3 are 8 further down
  const Stats* stats =
      static_cast<const Stats*>(params.stats) + stats_row(params, batch, head, block.batch, block.q_start, 0);
  Acc lse[kMTiles][2], delta[kMTiles][2];
#pragma unroll
  for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 16 * i + 8 * half;
      const Stats own = row < block.q_len ? ptx::ld_global(stats + row) : Stats{Limits<Acc>::infinity(), 0};
      lse[i][half] = own.lse * (kModified ? Acc(1) : ScoreBase<Acc>::kUnit);
      delta[i][half] = own.delta;
    }
  }

  Acc dq[kMTiles][kColumns / 8][4] = {}, unused[kMTiles][2] = {};
  [[maybe_unused]] Acc dslope[kMTiles][2] = {};  // of this lane's keys
  const auto compute = [&](int step, auto edge) {
    constexpr bool kEdge = decltype(edge)::kValue;
    const int key = keys.first + step * kKeys;
    const KTile k_tile{ring + step % kSlots * kSlot};
    // S = Q K^T;  dP = dO V^T
    Acc s[kMTiles][kNTiles][4] = {}, ds[kMTiles][kNTiles][4] = {};
    Op::template scores<kDim>(s, q_tile, warp_row, k_tile);
    Op::template scores<kValueDim>(ds, grad_tile, warp_row, VTile{k_tile.base + kKeys * kDim});

    // P = exp(S - lse);  dS = P (dP - D), 0 where hidden
    [[maybe_unused]] unsigned long long seen = 0;  // by this lane's rows: bit c is key c of the tile
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + 16 * i + 8 * half;
        const int low = kEdge ? block.low(row) : 0, high = kEdge ? block.high(row) : 0;
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = 8 * n + lane % 4 * 2 + e, col = key + c;
            bool visible = !kEdge || (col >= low && col < high);
            if constexpr (kMasked) {
              visible = visible && row < block.q_len && rule.allowed(row, col);
              seen |= static_cast<unsigned long long>(visible) << c;
            }
            ScoreChain<Acc> chain;
            const Acc score = rule.template score<true>(s[i][n][2 * half + e], row, col, chain);
            Acc& d = ds[i][n][2 * half + e];
            d = probability<kModified>(score, fold, lse[i][half]) * (d - delta[i][half]) * chain.score;
            d = visible ? d : Acc(0);
            if constexpr (kModified) {
              dslope[i][half] -= d * rule.distance(row, col);
              d = visible ? d * chain.cap : Acc(0);
            }
          }
        }
      }
    }
    if constexpr (kMasked) {  // the rows of K that no query of the block sees become zeros
      unsigned long long* seen_by = ptx::static_smem<unsigned long long, kWarps>();
#pragma unroll
      for (int delta = 16; delta > 0; delta /= 2) seen |= __shfl_xor_sync(0xffffffff, seen, delta);
      if (lane == 0) ptx::st_shared(seen_by + warp, seen);
      __syncthreads();  // every warp's `seen`; and every warp has multiplied with K
#pragma unroll
      for (int w = 0; w < kWarps; ++w) seen |= ptx::ld_shared(seen_by + w);
      for (int index = static_cast<int>(threadIdx.x); index < kKeys * KTile::kChunks; index += kThreads) {
        using Chunk = typename KTile::Chunk;
        const int row = index / KTile::kChunks;
        if ((seen >> row & 1) == 0) {
          ptx::st_shared(reinterpret_cast<Chunk*>(k_tile.chunk(row, index % KTile::kChunks)), Chunk{});
        }
      }
      __syncthreads();  // the zeros, before any warp multiplies with them; and `seen_by` has been read
    }
    // dQ += (dS chain) K
    Op::values(dq, unused, ds, KTile{k_tile.base + first_column});
  };
  for (int step = 0; step < tiles; ++step) {
    if constexpr (kSlots == 1) {
      __syncthreads();  // every warp has read the last tile
      load(step);
    }
    ptx::cp_async_wait<(kSlots > 1 ? kSlots - 2 : 0)>();
    __syncthreads();  // every thread's part of this tile; and every warp has read the last one
    if constexpr (kSlots > 1) load(step + kSlots - 1);
    const int key = keys.first + step * kKeys;
    if (key >= keys.all_begin && key + kKeys <= keys.all_end) {
      compute(step, Constant<false>());
    } else {
      compute(step, Constant<true>());
    }
  }

  // dQ = scale dQ;  dslope's share of a row
  ptx::cp_async_wait<0>();
  __syncthreads();  // nothing is in flight, and every warp has read its last tile: dQ takes their place
  store_gradient(dq, scale, Tile<T, kRows, kColumns>{smem}, warp_row, left, block.rows - block.first,
                 row_of<T>(params.dq, params.dq_stride, batch, head, first_row) + first_column * params.dq_stride[3],
                 params.dq_stride[2], params.dq_stride[3], min(kColumns, a.head_dim - first_column),
                 params.dq_is_vector);
  if (kModified && params.has_slopes && first_column == 0) {
    Acc* shares = static_cast<Acc*>(params.stats) + 2 * stats_rows(params) +
                  stats_row(params, batch, head, block.batch, block.q_start, 0);
#pragma unroll
    for (int i = 0; i < kMTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Acc share = group_sum<4>(dslope[i][half]);
        const int row = row0 + 16 * i + 8 * half;
        if (lane % 4 == 0 && row < block.q_len) ptx::st_global(shares + row, share);
      }
    }
  }
}
