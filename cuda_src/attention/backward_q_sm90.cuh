// dQ of a block of queries on Hopper's tensor cores, keys in tiles (attention/backward.cuh has the formulas).
//
//   producer, one warp:          Q, dO, and each tile of keys that a row of the block sees: K, V -> shared memory
//   consumers, 64 queries each:  for each tile of keys:
//                                  S = Q K^T;  dP = dO V^T          (the tensor cores, asynchronously)
//                                  P = exp(S - lse)
//                                  dS = P (dP - D), 0 where hidden
//                                  dQ += dS K
//                                dQ = scale dQ
//
// As attention/forward_sm90.cuh. NaN in K or V that no query sees stays out: rows of K that no query of the sequence
// sees become 0 in shared memory, whatever their dP is their dS is 0.
#pragma once

#include <attention/backward_accumulators_sm90.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/wgmma.cuh>

// Q and dO of each warpgroup, kStages tiles of K and V, barriers.
template <class T, int kWarpgroups, int kKeys, int kStages, int kDim, int kValueDim>
struct BackwardQSmem {
  using QTile = Panels<T, 64, kDim>;
  using GradTile = Panels<T, 64, kValueDim>;
  using KTile = Panels<T, kKeys, kDim>;
  using VTile = Panels<T, kKeys, kValueDim>;
  struct Barriers {  // full: the load has landed; free: all warps have read it
    unsigned long long q_full, k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
  };

  unsigned char* smem;

  __device__ __forceinline__ QTile q(int group) const { return {smem + group * QTile::kBytes}; }
  __device__ __forceinline__ GradTile grad(int group) const { return {q(kWarpgroups).base + group * GradTile::kBytes}; }
  __device__ __forceinline__ KTile k(int stage) const { return {grad(kWarpgroups).base + stage * KTile::kBytes}; }
  __device__ __forceinline__ VTile v(int stage) const { return {k(kStages).base + stage * VTile::kBytes}; }
  __device__ __forceinline__ Barriers& barriers() const { return *reinterpret_cast<Barriers*>(v(kStages).base); }
};

template <class T, int kWarpgroups, int kKeys, int kStages, int kDim, int kValueDim>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    attention_backward_q_sm90(const __grid_constant__ AttentionBackwardSm90Params params) {
  using Smem = BackwardQSmem<T, kWarpgroups, kKeys, kStages, kDim, kValueDim>;
  using Base = ScoreBase<float>;
  using Stats = RowStats<float>;
  constexpr int kRows = 64 * kWarpgroups;
  constexpr int kProducerRegisters = kWarpgroups == 2 ? 24 : 32, kConsumerRegisters = kWarpgroups == 2 ? 240 : 160;
  constexpr int kGroupBarrier = 1, kClearBarrier = 1 + kWarpgroups;

  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const Smem smem{ptx::dynamic_smem<unsigned char, 1024>()};
  typename Smem::Barriers& barriers = smem.barriers();
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&barriers.q_full, 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.k_full[i], 1);
      ptx::mbarrier_init(&barriers.v_full[i], 1);
      ptx::mbarrier_init(&barriers.k_free[i], 4 * kWarpgroups);
      ptx::mbarrier_init(&barriers.v_free[i], 4 * kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised before any warp uses them

  const int units = a.cu_seqlens_q != nullptr ? a.heads : a.batch * a.heads;
  QueryBlock block;
  if (!find_block(a, kRows, units, blockIdx.x, block)) return;  // the same for the whole block
  const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
  const int tiles = keys.tiles, batch = a.cu_seqlens_q != nullptr ? 0 : block.batch, k_head = block.head / a.sharing;
  const int first_row = static_cast<int>(block.q_start) + block.first;

  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0 && tiles > 0 && ptx::elect_one()) {
      ptx::mbarrier_arrive_expect_tx(&barriers.q_full, kWarpgroups * (Smem::QTile::kBytes + Smem::GradTile::kBytes));
#pragma unroll
      for (int group = 0; group < kWarpgroups; ++group) {
        smem.q(group).load(params.q, &barriers.q_full, 0, first_row + 64 * group, block.head, batch);
        smem.grad(group).load(params.grad, &barriers.q_full, 0, first_row + 64 * group, block.head, batch);
      }
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages, parity = tile / kStages % 2 ^ 1;
        const int key = static_cast<int>(block.k_start) + keys.first + tile * kKeys;
        ptx::mbarrier_wait(&barriers.k_free[stage], parity);  // the last K here is read
        ptx::mbarrier_arrive_expect_tx(&barriers.k_full[stage], Smem::KTile::kBytes);
        smem.k(stage).load(params.k, &barriers.k_full[stage], 0, key, k_head, batch);
        ptx::mbarrier_wait(&barriers.v_free[stage], parity);  // the last V here is read
        ptx::mbarrier_arrive_expect_tx(&barriers.v_full[stage], Smem::VTile::kBytes);
        smem.v(stage).load(params.v, &barriers.v_full[stage], 0, key, k_head, batch);
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int group = warp / 4 - 1;
  const int row0 = 16 * (warp % 4) + lane / 4, column0 = lane % 4 * 2;  // of d[0]; d[2] and d[3] are 8 rows further
  constexpr int kSpan = Smem::QTile::kSpan, kVSpan = Smem::GradTile::kSpan;
  const unsigned int q_descriptor = ptx::wgmma_descriptor(smem.q(group).base, 16);
  const unsigned int grad_descriptor = ptx::wgmma_descriptor(smem.grad(group).base, 16);
  const unsigned int k_descriptor = ptx::wgmma_descriptor(smem.k(0).base, 16);
  const unsigned int v_descriptor = ptx::wgmma_descriptor(smem.v(0).base, 16);
  const unsigned int k_columns = ptx::wgmma_descriptor(smem.k(0).base, Smem::KTile::kPanelBytes);
  const float scale = static_cast<float>(a.scale), fold = Base::kUnit * scale;
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
  const auto release = [&](unsigned long long& free) {  // for this warp
    if (lane == 0) ptx::mbarrier_arrive(&free);
  };
  // Rows of K that no query of the sequence sees, which may hold NaN, become 0. Every warp of the consumers calls it.
  const auto clear_keys = [&](int stage, int from, int to) {
    constexpr int kChunks = kDim / 8;
    ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // every warp has multiplied with K
    for (int i = static_cast<int>(threadIdx.x) - 128; i < (to - from) * kChunks; i += 128 * kWarpgroups) {
      ptx::st_shared(reinterpret_cast<uint4*>(smem.k(stage).chunk(from + i / kChunks, i % kChunks)), uint4{});
    }
    ptx::fence_proxy_async();                                   // the zeros, before wgmma reads them
    ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // those of every warp
  };
  const int seen = tiles > 0 ? block.high(block.q_len - 1) - keys.first : 0;  // no query sees keys from here on

  float dq[kDim / 2] = {}, s[kKeys / 2], dp[kKeys / 2];
  unsigned int ds[kKeys / 16][4];
  if (tiles > 0) ptx::mbarrier_wait(&barriers.q_full, 0);  // Q and dO have landed
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile % kStages, parity = tile / kStages % 2, key = keys.first + tile * kKeys;
    // S = Q K^T;  dP = dO V^T
    ptx::mbarrier_wait(&barriers.k_full[stage], parity);  // K has landed
    ptx::wgmma_fence();                                   // hands S and dP to the tensor cores
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      constexpr int kSteps = kSpan / 32;
      const int panel = i / kSteps, in_panel = i % kSteps * 32;
      ptx::wgmma_ss<T, kKeys, kSpan>(
          s, q_descriptor + (panel * Smem::QTile::kPanelBytes + in_panel) / 16,
          k_descriptor + stage * (Smem::KTile::kBytes / 16) + (panel * Smem::KTile::kPanelBytes + in_panel) / 16,
          i > 0);
    }
    ptx::wgmma_commit();
    ptx::mbarrier_wait(&barriers.v_full[stage], parity);  // V has landed
#pragma unroll
    for (int i = 0; i < kValueDim / 16; ++i) {
      constexpr int kSteps = kVSpan / 32;
      const int panel = i / kSteps, in_panel = i % kSteps * 32;
      ptx::wgmma_ss<T, kKeys, kVSpan>(
          dp, grad_descriptor + (panel * Smem::GradTile::kPanelBytes + in_panel) / 16,
          v_descriptor + stage * (Smem::VTile::kBytes / 16) + (panel * Smem::VTile::kPanelBytes + in_panel) / 16,
          i > 0);
    }
    ptx::wgmma_commit();
    // P = exp(S - lse)
    ptx::wgmma_wait<1>();  // S is complete
    const bool edge = key < keys.all_begin || key + kKeys > keys.all_end;
    if (edge) hide(s, -Limits<float>::infinity(), low, high, key + column0);
#pragma unroll
    for (int r = 0; r < kKeys / 2; ++r) s[r] = probability<false>(s[r], fold, lse[r / 2 % 2]);
    ptx::wgmma_wait<0>();  // dP is complete, and V is read
    release(barriers.v_free[stage]);
    // dS = P (dP - D), 0 where hidden
    if (edge) hide(dp, 0.0f, low, high, key + column0);  // whatever a hidden key holds
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = 8 * i + 2 * j;
        ds[i][j] = ptx::cvt_rn_x2<T>(s[r] * (dp[r] - delta[j % 2]), s[r + 1] * (dp[r + 1] - delta[j % 2]));
      }
    }
    if (tile == 0 && keys.unseen > 0) clear_keys(stage, 0, keys.unseen);
    if (tile == tiles - 1 && seen - tile * kKeys < kKeys) clear_keys(stage, seen - tile * kKeys, kKeys);
    // dQ += dS K
    ptx::wgmma_fence();  // hands dS and dQ to the tensor cores
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      ptx::wgmma_rs<T, kDim, kSpan>(dq, ds[i], k_columns + stage * (Smem::KTile::kBytes / 16) + i * kSpan, true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();  // dQ is complete, and K is read
    release(barriers.k_free[stage]);
  }

  // dQ = scale dQ, through this group's own Q
  ptx::named_barrier_sync(kGroupBarrier + group, 128);  // all warps of the group have read Q
  const int left = block.q_len - block.first - 64 * group, rows = block.rows - block.first - 64 * group;
  T* out = row_of<T>(p.dq, p.dq_stride, batch, block.head, block.q_start + block.first + 64 * group);
  store_accumulators(dq, scale, smem.q(group), left, rows, out, p.dq_stride, a.head_dim, p.dq_is_vector);
}
