// dK and dV of a block of keys on Hopper's tensor cores, queries in tiles (attention/backward.cuh has the formulas).
//
//   producer, one warp:       for each block of keys: K, V; for each query head that shares them, each tile of queries
//                             that see a key of the block: Q, dO -> shared memory; a second warp: lse and D of them
//   consumers, 64 keys each:  for each tile of queries:
//                               S^T = K Q^T;  dP^T = V dO^T         (the tensor cores, asynchronously)
//                               P^T = exp(S^T - lse), 0 where hidden
//                               dS^T = P^T (dP^T - D)
//                               kStoreDs: dS^T -> global memory
//                               dV += P^T dO;  dK += dS^T Q
//                             dK = scale dK
//
// Blocks are persistent: K, V and the first tiles of the next block of keys pass by while dK and dV of the last are
// stored. Rows of a warpgroup are keys: P^T and dS^T are left where the second products want them. Once P^T is rounded,
// the rounded one is all that is kept of it, which leaves registers for more queries. Rows of Q and dO that are
// padding, which may hold NaN, become 0 in shared memory. Stored dS is for attention/backward_ds_sm90.cuh, which makes
// dQ of it: every tile of queries of the block, with 0 where a score is hidden and for keys that are padding.
#pragma once

#include <attention/backward_accumulators_sm90.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/wgmma.cuh>

// K and V of each warpgroup; kStages tiles of Q and of dO; dK and dV of each warpgroup on their way; kStages tiles of
// statistics; barriers.
template <class T, int kWarpgroups, int kQueries, int kStages, int kDim, int kValueDim>
struct BackwardKvSmem {
  using KTile = Panels<T, 64, kDim>;
  using VTile = Panels<T, 64, kValueDim>;
  using QTile = Panels<T, kQueries, kDim>;
  using GradTile = Panels<T, kQueries, kValueDim>;
  static constexpr int kStats = 2 * kQueries;  // floats of a tile
  struct Barriers {                            // full: the load has landed; free: all warps have read it
    unsigned long long kv_full, kv_free, q_full[kStages], q_free[kStages], grad_full[kStages], grad_free[kStages];
  };

  unsigned char* smem;

  __device__ __forceinline__ KTile k(int group) const { return {smem + group * KTile::kBytes}; }
  __device__ __forceinline__ VTile v(int group) const { return {k(kWarpgroups).base + group * VTile::kBytes}; }
  __device__ __forceinline__ QTile q(int stage) const { return {v(kWarpgroups).base + stage * QTile::kBytes}; }
  __device__ __forceinline__ GradTile grad(int stage) const { return {q(kStages).base + stage * GradTile::kBytes}; }
  __device__ __forceinline__ Staging<T> staging(int group) const {
    return {grad(kStages).base + group * Staging<T>::kBytes};
  }
  // Of 16 queries lse, then D, each in the order in which lanes of a quad have four columns of an accumulator.
  __device__ __forceinline__ float* stats(int stage) const {
    return reinterpret_cast<float*>(staging(kWarpgroups).base) + stage * kStats;
  }
  static __device__ __forceinline__ int place(int query) {
    return query / 16 * 32 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2;
  }
  __device__ __forceinline__ Barriers& barriers() const { return *reinterpret_cast<Barriers*>(stats(kStages)); }
};

// The two elements of a word.
template <class T>
__device__ __forceinline__ float element(unsigned int word, int which) {
  const unsigned short bits = static_cast<unsigned short>(word >> 16 * which);
  return to_acc<float>(reinterpret_cast<const T&>(bits));
}

template <class T, int kWarpgroups, int kQueries, int kStages, int kDim, int kValueDim, bool kStoreDs>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    attention_backward_kv_sm90(const __grid_constant__ AttentionBackwardSm90Params params) {
  using Smem = BackwardKvSmem<T, kWarpgroups, kQueries, kStages, kDim, kValueDim>;
  using Base = ScoreBase<float>;
  using Stats = RowStats<float>;
  constexpr int kKeys = 64 * kWarpgroups;
  static_assert(!kStoreDs || kQueries % kImageRows == 0, "whole images");
  constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32, kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  constexpr int kClearBarrier = 1;

  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const Smem smem{ptx::dynamic_smem<unsigned char, 1024>()};
  typename Smem::Barriers& barriers = smem.barriers();
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barriers.kv_full, 1);
    ptx::mbarrier_init(&barriers.kv_free, 4 * kWarpgroups);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.q_full[i], 2);  // Q by TMA, the statistics by a warp
      ptx::mbarrier_init(&barriers.grad_full[i], 1);
      ptx::mbarrier_init(&barriers.q_free[i], 4 * kWarpgroups);
      ptx::mbarrier_init(&barriers.grad_free[i], 4 * kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised before any warp uses them

  const int kv_heads = a.heads / a.sharing, units = a.cu_seqlens_k != nullptr ? kv_heads : a.batch * kv_heads;
  const ScoreGradients& images = params.ds;
  const int count = kStoreDs ? images.units : units, first_unit = kStoreDs ? images.unit : 0;
  const auto find = [&](int round, KeyBlock& block) {  // what this block computes in a round, if anything
    unsigned int index;
    return params.schedule.find(round, index) && find_key_block(a, kKeys, count, index, block, first_unit);
  };
  unsigned int tile = 0;  // of Q and dO, of all rounds
  int kv_parity = 0;

  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    // Calls `load` for each tile of queries with the block, the tile's number in it, its stage and the parity to wait
    // for, its head among those that share K, and its first query.
    const auto for_tiles = [&](const auto& load) {
      for (int round = 0; round < params.schedule.rounds; ++round) {
        KeyBlock block;
        if (!find(round, block)) continue;
        const KeyBlock::Queries queries = block.queries<kQueries>(kKeys);
        int head = 0, query = queries.first;
        for (int step = 0; step < queries.tiles * a.sharing; ++step, ++tile) {
          load(block, step, tile % kStages, static_cast<int>(tile / kStages % 2 ^ 1), head, query);
          query += kQueries;
          if (query >= queries.first + queries.tiles * kQueries) query = queries.first, ++head;
        }
      }
    };
    if (warp == 0) {
      const bool leads = ptx::elect_one();
      for_tiles([&](const KeyBlock& block, int step, unsigned int stage, int parity, int head, int query) {
        if (!leads) return;
        const int batch = a.cu_seqlens_k != nullptr ? 0 : block.batch, row = static_cast<int>(block.q_start) + query;
        head += block.head * a.sharing;
        ptx::mbarrier_wait(&barriers.q_free[stage], parity);  // the last Q here is read
        ptx::mbarrier_arrive_expect_tx(&barriers.q_full[stage], Smem::QTile::kBytes);
        smem.q(stage).load(params.q, &barriers.q_full[stage], 0, row, head, batch);
        if (step == 0) {
          ptx::mbarrier_wait(&barriers.kv_free, kv_parity ^ 1);  // the last K and V are read
          kv_parity ^= 1;
          ptx::mbarrier_arrive_expect_tx(&barriers.kv_full, kWarpgroups * (Smem::KTile::kBytes + Smem::VTile::kBytes));
#pragma unroll
          for (int group = 0; group < kWarpgroups; ++group) {
            const int key = static_cast<int>(block.k_start) + block.first + 64 * group;
            smem.k(group).load(params.k, &barriers.kv_full, 0, key, block.head, batch);
            smem.v(group).load(params.v, &barriers.kv_full, 0, key, block.head, batch);
          }
        }
        ptx::mbarrier_wait(&barriers.grad_free[stage], parity);  // the last dO here is read
        ptx::mbarrier_arrive_expect_tx(&barriers.grad_full[stage], Smem::GradTile::kBytes);
        smem.grad(stage).load(params.grad, &barriers.grad_full[stage], 0, row, head, batch);
      });
    }
    if (warp == 1) {
      for_tiles([&](const KeyBlock& block, int, unsigned int stage, int parity, int head, int query) {
        const int batch = a.cu_seqlens_k != nullptr ? 0 : block.batch;
        const Stats* stats = static_cast<const Stats*>(p.stats) +
                             stats_row(p, batch, block.head * a.sharing + head, block.batch, block.q_start, query);
        ptx::mbarrier_wait(&barriers.q_free[stage], parity);  // the last statistics here are read
        float* const to = smem.stats(stage) + Smem::place(lane);
#pragma unroll
        for (int i = 0; i < kQueries; i += 32) {  // half of the lanes store D first: no conflict of banks
          const Stats own =
              query + i + lane < block.q_len ? ptx::ld_global(stats + i + lane) : Stats{Limits<float>::infinity(), 0};
          const float lse = own.lse * Base::kUnit;
          ptx::st_shared(to + 2 * i + lane / 16 * 16, lane < 16 ? lse : own.delta);
          ptx::st_shared(to + 2 * i + 16 - lane / 16 * 16, lane < 16 ? own.delta : lse);
        }
        __syncwarp();  // those of every lane
        if (lane == 0) ptx::mbarrier_arrive(&barriers.q_full[stage]);
      });
    }
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int group = warp / 4 - 1;
  const int row0 = 16 * (warp % 4) + lane / 4, column0 = lane % 4 * 2;  // of d[0]; d[2] and d[3] are 8 rows further
  const float scale = static_cast<float>(a.scale), fold = Base::kUnit * scale;

  for (int round = 0; round < params.schedule.rounds; ++round) {
    KeyBlock block;
    if (!find(round, block)) continue;
    const KeyBlock::Queries queries = block.queries<kQueries>(kKeys);
    const int batch = a.cu_seqlens_k != nullptr ? 0 : block.batch;
    const unsigned int end = tile + queries.tiles * a.sharing;
    const int key = block.first + 64 * group + row0;  // of row0
    int low[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      low[half] = block.first_query(key + 8 * half);
      high[half] = kStoreDs && key + 8 * half >= block.kv_len ? 0 : block.last_query(key + 8 * half);  // padding: none
    }
    // Rows of Q and dO from here on are padding that is there.
    const int padding = block.q_start + block.q_len < a.q_rows ? block.q_len : 1 << 30;

    float dk[kDim / 2] = {}, dv[kValueDim / 2] = {}, s[kQueries / 2], dp[kQueries / 2];
    unsigned int weights[kQueries / 16][4], ds[kQueries / 16][4];
    if (tile != end) {
      ptx::mbarrier_wait(&barriers.kv_full, kv_parity);  // K and V have landed
      kv_parity ^= 1;
    }
    uint4* image = nullptr;  // the thread's first chunk of the next one
    if constexpr (kStoreDs) {
      const int unit = block.batch * kv_heads + block.head - images.unit;
      const long long row = image_row(images, static_cast<long long>(unit) * a.sharing, block.first + 64 * group);
      image = static_cast<uint4*>(images.images) + (row + queries.first + row0) * 8 + lane % 4;
    }
    int query = queries.first;
    for (; tile != end; ++tile) {
      const unsigned int stage = tile % kStages;
      const int parity = static_cast<int>(tile / kStages % 2);
      const float4* stats = reinterpret_cast<const float4*>(smem.stats(stage)) + lane % 4;
      // S^T = K Q^T;  dP^T = V dO^T
      ptx::mbarrier_wait(&barriers.q_full[stage], parity);  // Q and the statistics have landed
      ptx::wgmma_fence();                                   // hands S and dP to the tensor cores
      start_product(s, smem.k(group), smem.q(stage));
      ptx::mbarrier_wait(&barriers.grad_full[stage], parity);  // dO has landed
      start_product(dp, smem.v(group), smem.grad(stage));
      // P^T = exp(S^T - lse), 0 where hidden
      ptx::wgmma_wait<1>();  // S is complete
      const bool edge = query < queries.all_begin || query + kQueries > queries.all_end ||
                        (kStoreDs && block.first + kKeys > block.kv_len);
      if (edge) hide(s, -Limits<float>::infinity(), low, high, query + column0);
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        const float4 four = ptx::ld_shared(stats + 8 * i);
        const float lse[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = 8 * i + 2 * j, column = j / 2 * 2;
          weights[i][j] = ptx::cvt_rn_x2<T>(probability<false>(s[r], fold, lse[column]),
                                            probability<false>(s[r + 1], fold, lse[column + 1]));
        }
      }
      ptx::wgmma_wait<0>();                                                       // dP is complete
      if (tile + 1 == end && lane == 0) ptx::mbarrier_arrive(&barriers.kv_free);  // K and V are read
      if (edge) hide(dp, 0.0f, low, high, query + column0);                       // whatever a hidden key holds
      if (padding < query + kQueries) {
        // The padding of Q and dO becomes 0. Every warp of the consumers is here: it is the last tile of a head.
        const int from = padding - query;
        ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // every warp has multiplied with Q and dO
        const int thread = static_cast<int>(threadIdx.x) - 128;
        clear_rows(smem.q(stage), from, kQueries, thread, 128 * kWarpgroups);
        clear_rows(smem.grad(stage), from, kQueries, thread, 128 * kWarpgroups);
        ptx::fence_proxy_async();                                   // the zeros, before wgmma reads them
        ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // those of every warp
      }
      // dS^T = P^T (dP^T - D)
#pragma unroll
      for (int i = 0; i < kQueries / 16; ++i) {
        const float4 four = ptx::ld_shared(stats + 8 * i + 4);
        const float delta[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float pair[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            pair[e] = element<T>(weights[i][j], e) * (dp[8 * i + 2 * j + e] - delta[j / 2 * 2 + e]);
          }
          ds[i][j] = ptx::cvt_rn_x2<T>(pair[0], pair[1]);
        }
      }
      if constexpr (kStoreDs) {  // before the tensor cores have the registers
#pragma unroll
        for (int i = 0; i < kQueries / 32; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const unsigned int (&left)[4] = ds[2 * i], (&right)[4] = ds[2 * i + 1];
            ptx::st_global(image + i / 2 * (kImageBytes / 16) + half * 64 + i % 2 * 4,
                           uint4{left[half], left[2 + half], right[half], right[2 + half]});
          }
        }
        image += kQueries / 64 * (kImageBytes / 16);
      }
      // dV += P^T dO;  dK += dS^T Q
      ptx::wgmma_fence();  // hands P, dS, dV and dK to the tensor cores
      start_sum(dv, weights, smem.grad(stage));
      start_sum(dk, ds, smem.q(stage));
      ptx::wgmma_wait<0>();  // dV and dK are complete; Q and dO are read
      __syncwarp();          // and the statistics, by every lane
      if (lane == 0) {
        ptx::mbarrier_arrive(&barriers.q_free[stage]);
        ptx::mbarrier_arrive(&barriers.grad_free[stage]);
      }
      query += kQueries;
      if (query >= queries.first + queries.tiles * kQueries) {
        query = queries.first;
        if constexpr (kStoreDs) {  // the next head
          image += (static_cast<long long>(images.k_tiles) * images.q_tiles * 64 - queries.tiles * kQueries) * 8;
        }
      }
    }

    // dK = scale dK
    const int left = block.kv_len - block.first - 64 * group, rows = block.k_rows - block.first - 64 * group;
    const long long first_key = block.k_start + block.first + 64 * group;
    store_accumulators(dk, scale, smem.staging(group), left, rows,
                       row_of<T>(p.dk, p.dk_stride, batch, block.head, first_key), p.dk_stride, a.head_dim,
                       p.dk_is_vector);
    store_accumulators(dv, 1.0f, smem.staging(group), left, rows,
                       row_of<T>(p.dv, p.dv_stride, batch, block.head, first_key), p.dv_stride, a.value_dim,
                       p.dv_is_vector);
  }
}
