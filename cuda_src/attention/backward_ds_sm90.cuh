// dQ of a block of queries on Hopper's tensor cores, from the dS that attention/backward_kv_sm90.cuh has stored.
//
//   producer, one warp:          each tile of keys that a row of the block sees: K, and dS^T of each warpgroup that has
//                                such a row -> shared memory
//   consumers, 64 queries each:  for each tile of keys:  dQ += dS K  (the tensor cores, asynchronously)
//                                dQ = scale dQ
//
// Both factors lie in shared memory as they were stored, keys by rows. Only those tiles of dS are read that a query of
// the warpgroup sees a key of: the others need not have been stored. As in attention/backward_q_sm90.cuh, rows of K
// that no query of the sequence sees become 0 in shared memory.
#pragma once

#include <attention/backward_accumulators_sm90.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/wgmma.cuh>

// kStages tiles of K, of each warpgroup as many of dS, barriers.
template <class T, int kWarpgroups, int kStages, int kDim>
struct BackwardDsSmem {
  using KTile = Panels<T, kImageRows, kDim>;
  using DsTile = Panels<T, kImageRows, 64>;
  using OutTile = Panels<T, 64, kDim>;
  // A warpgroup does not release its last tile, since the block has less than kWarpgroups tiles behind that one: its
  // last row sees at most 64 (kWarpgroups - 1) keys more than the warpgroup's.
  static_assert(kStages >= kWarpgroups, "no tile takes the place of a warpgroup's last one");
  static_assert(OutTile::kBytes <= kStages * DsTile::kBytes, "dQ of a warpgroup, in place of its dS");
  struct Barriers {  // full: the load has landed; free: all warps have read it
    unsigned long long full[kStages], free[kStages];
  };

  unsigned char* smem;

  __device__ __forceinline__ KTile k(int stage) const { return {smem + stage * KTile::kBytes}; }
  __device__ __forceinline__ DsTile ds(int group, int stage) const {
    return {k(kStages).base + (group * kStages + stage) * DsTile::kBytes};
  }
  __device__ __forceinline__ OutTile out(int group) const { return {ds(group, 0).base}; }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(ds(kWarpgroups, 0).base);
  }
};

template <class T, int kWarpgroups, int kStages, int kDim>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    attention_backward_ds_sm90(const __grid_constant__ AttentionBackwardDsParams params) {
  using Smem = BackwardDsSmem<T, kWarpgroups, kStages, kDim>;
  constexpr int kRows = 64 * kWarpgroups, kKeys = kImageRows;
  constexpr int kClearBarrier = 1, kGroupBarrier = 2;

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
  QueryBlock block;  // find_block: the same for the whole block
  if (!find_block(a, kRows, params.ds_of.units * a.sharing, blockIdx.x, block, first_head)) return;
  const QueryBlock::Keys keys = block.keys<kKeys>(kRows);
  const int tiles = keys.tiles;
  // The tiles that some row of a warpgroup sees: begin … end - 1.
  int begin[kWarpgroups], end[kWarpgroups];
#pragma unroll
  for (int group = 0; group < kWarpgroups; ++group) {
    QueryBlock own = block;
    own.first += 64 * group;
    const QueryBlock::Keys seen = own.keys<kKeys>(64);
    begin[group] = seen.tiles > 0 ? (seen.first - keys.first) / kKeys : 0;
    end[group] = begin[group] + seen.tiles;
  }

  if (warp < 4) {
    ptx::setmaxnreg_dec<24>();
    if (warp == 0 && tiles > 0 && ptx::elect_one()) {
      const int head = block.batch * a.heads + block.head - first_head;
      const int row = static_cast<int>(image_row(params.ds_of, head, keys.first)) + block.first;
      for (int tile = 0; tile < tiles; ++tile) {
        const int stage = tile % kStages, parity = tile / kStages % 2 ^ 1;
        unsigned long long* full = &barriers.full[stage];
        ptx::mbarrier_wait(&barriers.free[stage], parity);  // the last K and dS here are read
        int images = 0;
#pragma unroll
        for (int group = 0; group < kWarpgroups; ++group) images += tile >= begin[group] && tile < end[group];
        ptx::mbarrier_arrive_expect_tx(full, Smem::KTile::kBytes + images * Smem::DsTile::kBytes);
        smem.k(stage).load(params.k, full, 0, keys.first + tile * kKeys, block.head / a.sharing, block.batch);
#pragma unroll
        for (int group = 0; group < kWarpgroups; ++group) {
          if (tile < begin[group] || tile >= end[group]) continue;
          smem.ds(group, stage)
              .load(params.ds, full, 0, row + tile * params.ds_of.q_tiles * kImageRows + 64 * group, 0, 0);
        }
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<112>();
  const int group = warp / 4 - 1;
  int from = 0, to = 0;
#pragma unroll
  for (int i = 0; i < kWarpgroups; ++i) {
    if (i == group) from = begin[i], to = end[i];
  }
  constexpr int kSpan = Smem::KTile::kSpan;
  const unsigned int ds_columns = ptx::wgmma_descriptor(smem.ds(group, 0).base, Smem::DsTile::kPanelBytes);
  const unsigned int k_columns = ptx::wgmma_descriptor(smem.k(0).base, Smem::KTile::kPanelBytes);
  const int seen = tiles > 0 ? block.high(block.q_len - 1) - keys.first : 0;  // no query sees keys from here on
  // Rows of K that no query of the sequence sees, which may hold NaN, become 0. Every warp of the consumers calls it.
  const auto clear_keys = [&](int stage, int first, int last) {
    clear_rows(smem.k(stage), first, last, static_cast<int>(threadIdx.x) - 128, 128 * kWarpgroups);
    ptx::fence_proxy_async();                                   // the zeros, before wgmma reads them
    ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // those of every warp
  };
  const auto wait_for = [&](int tile) {
    const int stage = tile % kStages;
    ptx::mbarrier_wait(&barriers.full[stage], tile / kStages % 2);  // K and dS have landed
    if (tile == 0 && keys.unseen > 0) clear_keys(stage, 0, keys.unseen);
    if (tile == tiles - 1 && seen - tile * kKeys < kKeys) clear_keys(stage, seen - tile * kKeys, kKeys);
  };
  const auto release = [&](int tile) {  // for this warp
    if (lane == 0) ptx::mbarrier_arrive(&barriers.free[tile % kStages]);
  };
  const auto skip = [&](int tile) {  // one that only other warpgroups see
    wait_for(tile);
    __syncwarp();  // every lane has seen it land: the next one here must not land before
    release(tile);
  };

  float dq[kDim / 2] = {};
  int tile = 0;
  for (; tile < from; ++tile) skip(tile);
  for (; tile < to; ++tile) {
    const int stage = tile % kStages;
    wait_for(tile);
    // dQ += dS K
    ptx::wgmma_fence();  // hands dQ to the tensor cores
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      ptx::wgmma_ss_by_columns<T, kDim, 128, kSpan>(dq, ds_columns + stage * (Smem::DsTile::kBytes / 16) + i * 128,
                                                    k_columns + stage * (Smem::KTile::kBytes / 16) + i * kSpan, true);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // K and dS of the tile before are read
    if (tile > from) release(tile - 1);
  }
  ptx::wgmma_wait<0>();  // dQ is complete; nothing is loaded any more in the place of its last tile
  for (; tile < tiles; ++tile) skip(tile);

  // dQ = scale dQ, through this group's own dS
  ptx::named_barrier_sync(kGroupBarrier + group, 128);  // all warps of the group have read dS
  const int left = block.q_len - block.first - 64 * group, rows = block.rows - block.first - 64 * group;
  T* out = row_of<T>(p.dq, p.dq_stride, block.batch, block.head, block.first + 64 * group);
  store_accumulators<true>(dq, static_cast<float>(a.scale), smem.out(group), left, rows, out, p.dq_stride, a.head_dim,
                           p.dq_is_vector);
}
