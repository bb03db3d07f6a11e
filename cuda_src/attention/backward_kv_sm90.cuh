// dK and dV of a block of keys on Hopper's tensor cores, queries in tiles (attention/backward.cuh has the formulas).
//
//   producer, one warp:       K, V; for each query head that shares them, each tile of queries that see a key of the
//                             block: Q, dO -> shared memory; a second warp: lse and D of these queries
//   consumers, 64 keys each:  for each tile of queries:
//                               S^T = K Q^T;  dP^T = V dO^T         (the tensor cores, asynchronously)
//                               P^T = exp(S^T - lse), 0 where hidden
//                               dS^T = P^T (dP^T - D)
//                               kStoreDs: dS^T -> global memory
//                               dV += P^T dO;  dK += dS^T Q
//                             dK = scale dK
//
// Rows of a warpgroup are keys: P^T and dS^T are left where the second products want them. Once P^T is rounded, the
// rounded one is all that is kept of it, which leaves registers for more queries. Rows of Q and dO that are padding,
// which may hold NaN, become 0 in shared memory. Stored dS is for attention/backward_ds_sm90.cuh, which makes dQ of it:
// every tile of queries of the block, with 0 where a score is hidden and for keys that are padding.
#pragma once

#include <attention/backward_accumulators_sm90.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/wgmma.cuh>

// K and V of each warpgroup; kStages tiles of Q, of dO and of statistics; barriers.
template <class T, int kWarpgroups, int kQueries, int kStages, int kDim, int kValueDim>
struct BackwardKvSmem {
  using KTile = Panels<T, 64, kDim>;
  using VTile = Panels<T, 64, kValueDim>;
  using QTile = Panels<T, kQueries, kDim>;
  using GradTile = Panels<T, kQueries, kValueDim>;
  static constexpr int kStats = 2 * kQueries;  // floats of a tile
  struct Barriers {                            // full: the load has landed; free: all warps have read it
    unsigned long long kv_full, q_full[kStages], q_free[kStages], grad_full[kStages], grad_free[kStages];
  };

  unsigned char* smem;

  __device__ __forceinline__ KTile k(int group) const { return {smem + group * KTile::kBytes}; }
  __device__ __forceinline__ VTile v(int group) const { return {k(kWarpgroups).base + group * VTile::kBytes}; }
  __device__ __forceinline__ QTile q(int stage) const { return {v(kWarpgroups).base + stage * QTile::kBytes}; }
  __device__ __forceinline__ GradTile grad(int stage) const { return {q(kStages).base + stage * GradTile::kBytes}; }
  // Of 16 queries lse, then D, each in the order in which lanes of a quad have four columns of an accumulator.
  __device__ __forceinline__ float* stats(int stage) const {
    return reinterpret_cast<float*>(grad(kStages).base) + stage * kStats;
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
  constexpr int kGroupBarrier = 1, kClearBarrier = 1 + kWarpgroups;

  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const Smem smem{ptx::dynamic_smem<unsigned char, 1024>()};
  typename Smem::Barriers& barriers = smem.barriers();
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barriers.kv_full, 1);
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
  KeyBlock block;
  const int count = kStoreDs ? images.units : units, first_unit = kStoreDs ? images.unit : 0;
  if (!find_key_block(a, kKeys, count, blockIdx.x, block, first_unit)) return;  // the same for the whole block
  const KeyBlock::Queries queries = block.queries<kQueries>(kKeys);
  const int steps = queries.tiles * a.sharing, first_head = block.head * a.sharing;
  const int batch = a.cu_seqlens_k != nullptr ? 0 : block.batch;

  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0 && steps > 0 && ptx::elect_one()) {
      ptx::mbarrier_arrive_expect_tx(&barriers.kv_full, kWarpgroups * (Smem::KTile::kBytes + Smem::VTile::kBytes));
#pragma unroll
      for (int group = 0; group < kWarpgroups; ++group) {
        const int key = static_cast<int>(block.k_start) + block.first + 64 * group;
        smem.k(group).load(params.k, &barriers.kv_full, 0, key, block.head, batch);
        smem.v(group).load(params.v, &barriers.kv_full, 0, key, block.head, batch);
      }
      int head = first_head, query = queries.first;
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, parity = step / kStages % 2 ^ 1;
        const int row = static_cast<int>(block.q_start) + query;
        ptx::mbarrier_wait(&barriers.q_free[stage], parity);  // the last Q here is read
        ptx::mbarrier_arrive_expect_tx(&barriers.q_full[stage], Smem::QTile::kBytes);
        smem.q(stage).load(params.q, &barriers.q_full[stage], 0, row, head, batch);
        ptx::mbarrier_wait(&barriers.grad_free[stage], parity);  // the last dO here is read
        ptx::mbarrier_arrive_expect_tx(&barriers.grad_full[stage], Smem::GradTile::kBytes);
        smem.grad(stage).load(params.grad, &barriers.grad_full[stage], 0, row, head, batch);
        query += kQueries;
        if (query >= queries.first + queries.tiles * kQueries) query = queries.first, ++head;
      }
    }
    if (warp == 1) {
      const Stats* stats =
          static_cast<const Stats*>(p.stats) + stats_row(p, batch, first_head, block.batch, block.q_start, 0);
      int query = queries.first;
      for (int step = 0; step < steps; ++step) {
        const int stage = step % kStages, parity = step / kStages % 2 ^ 1;
        ptx::mbarrier_wait(&barriers.q_free[stage], parity);  // the last statistics here are read
        for (int first = 0; first < kQueries; first += 16) {  // half of the lanes have lse, the others D
          const int i = first + lane % 16;
          const Stats own =
              query + i < block.q_len ? ptx::ld_global(stats + query + i) : Stats{Limits<float>::infinity(), 0};
          ptx::st_shared(smem.stats(stage) + Smem::place(i) + lane / 16 * 16,
                         lane < 16 ? own.lse * Base::kUnit : own.delta);
        }
        __syncwarp();  // those of every lane
        if (lane == 0) ptx::mbarrier_arrive(&barriers.q_full[stage]);
        query += kQueries;
        if (query >= queries.first + queries.tiles * kQueries) query = queries.first, stats += p.stat_rows;
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int group = warp / 4 - 1;
  const int row0 = 16 * (warp % 4) + lane / 4, column0 = lane % 4 * 2;  // of d[0]; d[2] and d[3] are 8 rows further
  const float scale = static_cast<float>(a.scale), fold = Base::kUnit * scale;
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
  if (steps > 0) ptx::mbarrier_wait(&barriers.kv_full, 0);  // K and V have landed
  uint4* image = nullptr;                                   // the thread's first chunk of the next one
  if constexpr (kStoreDs) {
    const int unit = block.batch * kv_heads + block.head - images.unit;
    const long long row = image_row(images, static_cast<long long>(unit) * a.sharing, block.first + 64 * group);
    image = static_cast<uint4*>(images.images) + (row + queries.first + row0) * 8 + lane % 4;
  }
  int query = queries.first;
  for (int step = 0; step < steps; ++step) {
    const int stage = step % kStages, parity = step / kStages % 2;
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
    ptx::wgmma_wait<0>();                                  // dP is complete
    if (edge) hide(dp, 0.0f, low, high, query + column0);  // whatever a hidden key holds
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

  // dK = scale dK; both through this group's own K and V
  ptx::named_barrier_sync(kGroupBarrier + group, 128);  // all warps of the group have read K and V
  const int left = block.kv_len - block.first - 64 * group, rows = block.k_rows - block.first - 64 * group;
  const long long first_key = block.k_start + block.first + 64 * group;
  store_accumulators(dk, scale, smem.k(group), left, rows, row_of<T>(p.dk, p.dk_stride, batch, block.head, first_key),
                     p.dk_stride, a.head_dim, p.dk_is_vector);
  store_accumulators(dv, 1.0f, smem.v(group), left, rows, row_of<T>(p.dv, p.dv_stride, batch, block.head, first_key),
                     p.dv_stride, a.value_dim, p.dv_is_vector);
}
