// dQ of a block of queries on Hopper's tensor cores, keys in tiles (attention/backward.cuh has the formulas).
//
//   producer, one warp:          for each block of queries: Q, dO, and each tile of keys that a row of the block sees:
//                                K, V -> shared memory; K = 0 where no query of the sequence sees it
//   consumers, 64 queries each:  for each tile of keys:
//                                  S = Q K^T;  dP = dO V^T          (the tensor cores, asynchronously)
//                                  P = exp(S - lse)
//                                  dS = P (dP - D), 0 where hidden
//                                  dQ += dS K
//                                dQ = scale dQ
//
// As attention/forward_sm90.cuh: blocks are persistent, so that loads of the next block of queries pass by while dQ of
// the last is stored. kStaging: dQ has shared memory of its own for that; else it takes the place of Q, and there is
// one round. NaN in K or V that no query sees stays out: K is 0 there, and dS, whatever dP is.
#pragma once

#include <attention/backward_accumulators_sm90.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/wgmma.cuh>

// Q and dO of each warpgroup, kStages tiles of K and kValueStages of V, dQ of each warpgroup on its way (kStaging),
// barriers.
template <class T, int kWarpgroups, int kKeys, int kStages, int kValueStages, int kDim, int kValueDim, bool kStaging>
struct BackwardQSmem {
  using QTile = Panels<T, 64, kDim>;
  using GradTile = Panels<T, 64, kValueDim>;
  using KTile = Panels<T, kKeys, kDim>;
  using VTile = Panels<T, kKeys, kValueDim>;
  struct Barriers {  // full: it is there; free: all warps have read it; landed: a K, parts of which are to become 0
    unsigned long long q_full, q_free, landed, k_full[kStages], k_free[kStages], v_full[kValueStages],
        v_free[kValueStages];
  };

  unsigned char* smem;

  __device__ __forceinline__ QTile q(int group) const { return {smem + group * QTile::kBytes}; }
  __device__ __forceinline__ GradTile grad(int group) const { return {q(kWarpgroups).base + group * GradTile::kBytes}; }
  __device__ __forceinline__ KTile k(int stage) const { return {grad(kWarpgroups).base + stage * KTile::kBytes}; }
  __device__ __forceinline__ VTile v(int stage) const { return {k(kStages).base + stage * VTile::kBytes}; }
  __device__ __forceinline__ Staging<T> staging(int group) const {
    return {kStaging ? v(kValueStages).base + group * Staging<T>::kBytes : q(group).base};
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(v(kValueStages).base + (kStaging ? kWarpgroups * Staging<T>::kBytes : 0));
  }
};

template <class T, int kWarpgroups, int kKeys, int kStages, int kValueStages, int kDim, int kValueDim, bool kStaging>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    attention_backward_q_sm90(const __grid_constant__ AttentionBackwardSm90Params params) {
  using Smem = BackwardQSmem<T, kWarpgroups, kKeys, kStages, kValueStages, kDim, kValueDim, kStaging>;
  using Base = ScoreBase<float>;
  using Stats = RowStats<float>;
  constexpr int kRows = 64 * kWarpgroups;
  constexpr int kProducerRegisters = kWarpgroups == 2 ? 40 : 32, kConsumerRegisters = kWarpgroups == 2 ? 232 : 160;
  constexpr int kGroupBarrier = 1;

  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const Smem smem{ptx::dynamic_smem<unsigned char, 1024>()};
  typename Smem::Barriers& barriers = smem.barriers();
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barriers.q_full, 1);
    ptx::mbarrier_init(&barriers.q_free, 4 * kWarpgroups);
    ptx::mbarrier_init(&barriers.landed, 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.k_full[i], 1);
      ptx::mbarrier_init(&barriers.k_free[i], 4 * kWarpgroups);
    }
    for (int i = 0; i < kValueStages; ++i) {
      ptx::mbarrier_init(&barriers.v_full[i], 1);
      ptx::mbarrier_init(&barriers.v_free[i], 4 * kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised before any warp uses them

  const int units = a.cu_seqlens_q != nullptr ? a.heads : a.batch * a.heads;
  const auto find = [&](int round, QueryBlock& block) {  // what this block computes in a round, if anything
    unsigned int index;
    return params.schedule.find(round, index) && find_block(a, kRows, units, index, block);
  };
  unsigned int tile = 0;  // of K and of V, of all rounds
  int q_parity = 0;

  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp > 0) return;
    int landed = 0;  // parity
    for (int round = 0; round < params.schedule.rounds; ++round) {
      QueryBlock block;
      if (!find(round, block)) continue;
      const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
      const int batch = a.cu_seqlens_q != nullptr ? 0 : block.batch, k_head = block.head / a.sharing;
      const int seen = block.high(block.q_len - 1) - keys.first;  // no query of the sequence sees keys from here on
      for (int j = 0; j < keys.tiles; ++j, ++tile) {
        const unsigned int stage = tile % kStages, v_stage = tile % kValueStages;
        const int key = static_cast<int>(block.k_start) + keys.first + j * kKeys;
        const int begin = j == 0 ? max(keys.unseen, 0) : 0, end = min(seen - j * kKeys, kKeys);
        const bool all_seen = begin == 0 && end == kKeys;
        if (ptx::elect_one()) {
          unsigned long long* full = all_seen ? &barriers.k_full[stage] : &barriers.landed;
          ptx::mbarrier_wait(&barriers.k_free[stage], tile / kStages % 2 ^ 1);  // the last K here is read
          ptx::mbarrier_arrive_expect_tx(full, Smem::KTile::kBytes);
          smem.k(stage).load(params.k, full, 0, key, k_head, batch);
          if (j == 0) {
            const int row = static_cast<int>(block.q_start) + block.first;
            ptx::mbarrier_wait(&barriers.q_free, q_parity ^ 1);  // the last Q and dO are read
            ptx::mbarrier_arrive_expect_tx(&barriers.q_full,
                                           kWarpgroups * (Smem::QTile::kBytes + Smem::GradTile::kBytes));
#pragma unroll
            for (int group = 0; group < kWarpgroups; ++group) {
              smem.q(group).load(params.q, &barriers.q_full, 0, row + 64 * group, block.head, batch);
              smem.grad(group).load(params.grad, &barriers.q_full, 0, row + 64 * group, block.head, batch);
            }
          }
          ptx::mbarrier_wait(&barriers.v_free[v_stage], tile / kValueStages % 2 ^ 1);  // the last V here is read
          ptx::mbarrier_arrive_expect_tx(&barriers.v_full[v_stage], Smem::VTile::kBytes);
          smem.v(v_stage).load(params.v, &barriers.v_full[v_stage], 0, key, k_head, batch);
        }
        if (all_seen) continue;
        // Rows of K that no query of the sequence sees, which may hold NaN, become 0.
        ptx::mbarrier_wait(&barriers.landed, landed);  // K has landed
        landed ^= 1;
        clear_rows(smem.k(stage), 0, begin, lane, 32);
        clear_rows(smem.k(stage), end, kKeys, lane, 32);
        ptx::fence_proxy_async();  // the zeros, before wgmma reads them
        __syncwarp();              // those of every lane
        if (lane == 0) ptx::mbarrier_arrive(&barriers.k_full[stage]);
      }
      if (keys.tiles > 0) q_parity ^= 1;
    }
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int group = warp / 4 - 1;
  const int row0 = 16 * (warp % 4) + lane / 4, column0 = lane % 4 * 2;  // of d[0]; d[2] and d[3] are 8 rows further
  const float scale = static_cast<float>(a.scale), fold = Base::kUnit * scale;
  const auto release = [&](unsigned long long& free) {  // for this warp
    if (lane == 0) ptx::mbarrier_arrive(&free);
  };

  for (int round = 0; round < params.schedule.rounds; ++round) {
    QueryBlock block;
    if (!find(round, block)) continue;
    const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
    const int batch = a.cu_seqlens_q != nullptr ? 0 : block.batch;
    const Stats* stats =
        static_cast<const Stats*>(p.stats) + stats_row(p, batch, block.head, block.batch, block.q_start, 0);
    float lse[2], delta[2];
    int low[2], high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = block.first + 64 * group + row0 + 8 * half;
      const Stats own = row < block.q_len ? ptx::ld_global(stats + row) : Stats{Limits<float>::infinity(), 0};
      lse[half] = own.lse * Base::kUnit;
      delta[half] = own.delta;
      low[half] = block.low(row);
      high[half] = block.high(row);
    }

    float dq[kDim / 2] = {}, s[kKeys / 2], dp[kKeys / 2];
    unsigned int ds[kKeys / 16][4];
    if (keys.tiles > 0) {
      ptx::mbarrier_wait(&barriers.q_full, q_parity);  // Q and dO have landed
      q_parity ^= 1;
    }
    const int end = keys.first + keys.tiles * kKeys;
    for (int key = keys.first; key < end; key += kKeys, ++tile) {
      const unsigned int stage = tile % kStages, v_stage = tile % kValueStages;
      // S = Q K^T;  dP = dO V^T
      ptx::mbarrier_wait(&barriers.k_full[stage], tile / kStages % 2);  // K has landed
      ptx::wgmma_fence();                                               // hands S and dP to the tensor cores
      start_product(s, smem.q(group), smem.k(stage));
      ptx::mbarrier_wait(&barriers.v_full[v_stage], tile / kValueStages % 2);  // V has landed
      start_product(dp, smem.grad(group), smem.v(v_stage));
      // P = exp(S - lse)
      ptx::wgmma_wait<1>();  // S is complete
      const bool edge = key < keys.all_begin || key + kKeys > keys.all_end;
      if (edge) hide(s, -Limits<float>::infinity(), low, high, key + column0);
      probabilities(s, fold, lse);
      ptx::wgmma_wait<0>();  // dP is complete, and V is read
      release(barriers.v_free[v_stage]);
      if (kStaging && key + kKeys == end) release(barriers.q_free);  // Q and dO are read
      // dS = P (dP - D), 0 where hidden
      if (edge) hide(dp, 0.0f, low, high, key + column0);  // whatever a hidden key holds
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int r = 8 * i + 2 * e;
          ds[i][e] = ptx::cvt_rn_x2<T>(s[r] * (dp[r] - delta[e % 2]), s[r + 1] * (dp[r + 1] - delta[e % 2]));
        }
      }
      // dQ += dS K
      ptx::wgmma_fence();  // hands dS and dQ to the tensor cores
      start_sum(dq, ds, smem.k(stage));
      ptx::wgmma_wait<0>();  // dQ is complete, and K is read
      release(barriers.k_free[stage]);
    }

    // dQ = scale dQ
    if constexpr (!kStaging) ptx::named_barrier_sync(kGroupBarrier + group, 128);  // all warps of the group have read Q
    const int left = block.q_len - block.first - 64 * group, rows = block.rows - block.first - 64 * group;
    T* out = row_of<T>(p.dq, p.dq_stride, batch, block.head, block.q_start + block.first + 64 * group);
    store_accumulators(dq, scale, smem.staging(group), left, rows, out, p.dq_stride, a.head_dim, p.dq_is_vector);
  }
}
