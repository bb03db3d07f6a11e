// dQ of a block of queries on Hopper's tensor cores, from the dS that attention/backward_kv_sm90.cuh has stored.
//
//   producer, one warp:          for each block of queries, each tile of keys that a row of it sees: K, and dS^T of
//                                each warpgroup that has such a row -> shared memory
//   consumers, 64 queries each:  for each tile of keys:  dQ += dS K  (the tensor cores, asynchronously)
//                                dQ = scale dQ
//
// Both factors lie in shared memory as they were stored, keys by rows. Only those tiles of dS are read that a query of
// the warpgroup sees a key of: the others need not have been stored. As in attention/backward_q_sm90.cuh, rows of K
// that no query of the sequence sees become 0 in shared memory; and blocks are persistent, tiles of the next block of
// queries being loaded while dQ of the last is stored.
#pragma once

#include <attention/backward_accumulators_sm90.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/wgmma.cuh>

// kStages tiles of K, of each warpgroup as many of dS, dQ of each warpgroup on its way, barriers.
template <class T, int kWarpgroups, int kStages, int kDim>
struct BackwardDsSmem {
  using KTile = Panels<T, kImageRows, kDim>;
  using DsTile = Panels<T, kImageRows, 64>;
  struct Barriers {  // full: the load has landed; free: all warps have read it
    unsigned long long full[kStages], free[kStages];
  };

  unsigned char* smem;

  __device__ __forceinline__ KTile k(int stage) const { return {smem + stage * KTile::kBytes}; }
  __device__ __forceinline__ DsTile ds(int group, int stage) const {
    return {k(kStages).base + (group * kStages + stage) * DsTile::kBytes};
  }
  __device__ __forceinline__ Staging<T> staging(int group) const {
    return {ds(kWarpgroups, 0).base + group * Staging<T>::kBytes};
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(staging(kWarpgroups).base);
  }
};

template <class T, int kWarpgroups, int kStages, int kDim>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    attention_backward_ds_sm90(const __grid_constant__ AttentionBackwardDsParams params) {
  using Smem = BackwardDsSmem<T, kWarpgroups, kStages, kDim>;
  constexpr int kRows = 64 * kWarpgroups, kKeys = kImageRows;
  constexpr int kClearBarrier = 1;

  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const Smem smem{ptx::dynamic_smem<unsigned char, 1024>()};
  typename Smem::Barriers& barriers = smem.barriers();
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&barriers.full[i], 1);
      ptx::mbarrier_init(&barriers.free[i], 4 * kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // the barriers are initialised before any warp uses them

  const int first_head = params.ds_of.unit * a.sharing;
  const auto find = [&](int round, QueryBlock& block) {  // what this block computes in a round, if anything
    unsigned int index;
    return params.schedule.find(round, index) &&
           find_block(a, kRows, params.ds_of.units * a.sharing, index, block, first_head);
  };
  // The tiles that some row of a warpgroup sees, of those of the block: begin … end - 1.
  const auto seen_by = [&](const QueryBlock& block, const QueryBlock::Keys& keys, int group, int& begin, int& end) {
    QueryBlock own = block;
    own.first += 64 * group;
    const QueryBlock::Keys seen = own.keys<kKeys>(64);
    begin = seen.tiles > 0 ? (seen.first - keys.first) / kKeys : 0;
    end = begin + seen.tiles;
  };
  unsigned int tile = 0;  // of all rounds

  if (warp < 4) {
    ptx::setmaxnreg_dec<56>();
    if (warp > 0) return;
    const bool leads = ptx::elect_one();
    for (int round = 0; round < params.schedule.rounds; ++round) {
      QueryBlock block;
      if (!find(round, block) || !leads) continue;
      const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
      int begin[kWarpgroups], end[kWarpgroups];
#pragma unroll
      for (int group = 0; group < kWarpgroups; ++group) seen_by(block, keys, group, begin[group], end[group]);
      const int head = block.batch * a.heads + block.head - first_head;
      const int row = static_cast<int>(image_row(params.ds_of, head, keys.first)) + block.first;
      for (int j = 0; j < keys.tiles; ++j, ++tile) {
        const int stage = tile % kStages, parity = tile / kStages % 2 ^ 1;
        unsigned long long* full = &barriers.full[stage];
        ptx::mbarrier_wait(&barriers.free[stage], parity);  // the last K and dS here are read
        int images = 0;
#pragma unroll
        for (int group = 0; group < kWarpgroups; ++group) images += j >= begin[group] && j < end[group];
        ptx::mbarrier_arrive_expect_tx(full, Smem::KTile::kBytes + images * Smem::DsTile::kBytes);
        smem.k(stage).load(params.k, full, 0, keys.first + j * kKeys, block.head / a.sharing, block.batch);
#pragma unroll
        for (int group = 0; group < kWarpgroups; ++group) {
          if (j < begin[group] || j >= end[group]) continue;
          smem.ds(group, stage)
              .load(params.ds, full, 0, row + j * params.ds_of.q_tiles * kImageRows + 64 * group, 0, 0);
        }
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<104>();
  const int group = warp / 4 - 1;
  constexpr int kSpan = Smem::KTile::kSpan;
  const unsigned int ds_columns = ptx::wgmma_descriptor(smem.ds(group, 0).base, Smem::DsTile::kPanelBytes);
  const unsigned int k_columns = ptx::wgmma_descriptor(smem.k(0).base, Smem::KTile::kPanelBytes);

  for (int round = 0; round < params.schedule.rounds; ++round) {
    QueryBlock block;
    if (!find(round, block)) continue;
    const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
    const int tiles = keys.tiles;
    int from, to;
    seen_by(block, keys, group, from, to);
    const int seen = tiles > 0 ? block.high(block.q_len - 1) - keys.first : 0;  // no query sees keys from here on
    // Rows of K that no query of the sequence sees, which may hold NaN, become 0. Every warp of the consumers calls it.
    const auto clear_keys = [&](int stage, int first, int last) {
      clear_rows(smem.k(stage), first, last, static_cast<int>(threadIdx.x) - 128, 128 * kWarpgroups);
      ptx::fence_proxy_async();                                   // the zeros, before wgmma reads them
      ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // those of every warp
    };
    const auto wait_for = [&](int j) {
      const int stage = (tile + j) % kStages;
      ptx::mbarrier_wait(&barriers.full[stage], (tile + j) / kStages % 2);  // K and dS have landed
      if (j == 0 && keys.unseen > 0) clear_keys(stage, 0, keys.unseen);
      if (j == tiles - 1 && seen - j * kKeys < kKeys) clear_keys(stage, seen - j * kKeys, kKeys);
    };
    const auto release = [&](int j) {  // for this warp
      if (lane == 0) ptx::mbarrier_arrive(&barriers.free[(tile + j) % kStages]);
    };
    const auto skip = [&](int j) {  // one that only other warpgroups see
      wait_for(j);
      __syncwarp();  // every lane has seen it land: the next one here must not land before
      release(j);
    };

    float dq[kDim / 2] = {};
    int j = 0;
    for (; j < from; ++j) skip(j);
    for (; j < to; ++j) {
      const int stage = (tile + j) % kStages;
      wait_for(j);
      // dQ += dS K
      ptx::wgmma_fence();  // hands dQ to the tensor cores
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        ptx::wgmma_ss_by_columns<T, kDim, 128, kSpan>(dq, ds_columns + stage * (Smem::DsTile::kBytes / 16) + i * 128,
                                                      k_columns + stage * (Smem::KTile::kBytes / 16) + i * kSpan, true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // K and dS of the tile before are read
      if (j > from) release(j - 1);
    }
    ptx::wgmma_wait<0>();  // dQ is complete; K and dS of the last tile are read
    if (to > from) release(to - 1);
    for (; j < tiles; ++j) skip(j);
    tile += tiles;

    // dQ = scale dQ
    const int left = block.q_len - block.first - 64 * group, rows = block.rows - block.first - 64 * group;
    T* out = row_of<T>(p.dq, p.dq_stride, block.batch, block.head, block.first + 64 * group);
    store_accumulators<true>(dq, static_cast<float>(a.scale), smem.staging(group), left, rows, out, p.dq_stride,
                             a.head_dim, p.dq_is_vector);
  }
}
