// Parts of attention/forward_sm90.cuh: its shared memory, the work of each round, and the loading warp.
#pragma once

#include <attention/key_tiles.cuh>
#include <attention/panels.cuh>
#include <ptx/elect.cuh>
#include <ptx/mbarrier.cuh>

// Q of each warpgroup, kStages tiles of K and of V, `out` of each warpgroup (kOwnOut; else in place of its Q),
// barriers; with a block mask also what the warps have seen of a tile (VisibleKeys).
template <class T, int kWarpgroups, int kTileKeys, int kTileStages, int kDim, int kValueDim, bool kOwnOut>
struct AttentionSmem {
  static constexpr int kStages = kTileStages, kRows = 64 * kWarpgroups, kKeys = kTileKeys;
  using QTile = Panels<T, 64, kDim>;
  using KTile = Panels<T, kKeys, kDim>;
  using VTile = Panels<T, kKeys, kValueDim>;
  using OutTile = Panels<T, 64, kValueDim>;
  static constexpr int kQBytes = kOwnOut || kDim > kValueDim ? QTile::kBytes : OutTile::kBytes;

  // Barriers in shared memory. full: the load has landed; free: all warps that use it are done.
  // v_unseen: V of a first tile whose leading keys no query sees, for which consumers wait early, to clear these rows.
  // As a phase is waited for once, v_full then completes without bytes, for the wait that every tile has.
  struct Barriers {
    unsigned long long q_full[kWarpgroups], q_free[kWarpgroups];
    unsigned long long k_full[kStages], k_free[kStages], v_full[kStages], v_free[kStages];
    unsigned long long v_unseen;
  };

  // Tiles of K are counted over all rounds, and so are those of V: they go round kStages slots.
  static __device__ __forceinline__ int slot(unsigned int tile) { return static_cast<int>(tile % kStages); }
  static __device__ __forceinline__ int parity(unsigned int tile) { return static_cast<int>(tile / kStages % 2); }

  unsigned char* smem;

  __device__ __forceinline__ QTile q(int group) const { return {smem + group * kQBytes}; }
  __device__ __forceinline__ KTile k(int stage) const { return {smem + kWarpgroups * kQBytes + stage * KTile::kBytes}; }
  __device__ __forceinline__ VTile v(int stage) const { return {k(kStages).base + stage * VTile::kBytes}; }
  __device__ __forceinline__ OutTile out(int group) const {
    return {kOwnOut ? v(kStages).base + group * OutTile::kBytes : q(group).base};
  }
  __device__ __forceinline__ Barriers& barriers() const {
    return *reinterpret_cast<Barriers*>(v(kStages).base + (kOwnOut ? kWarpgroups * OutTile::kBytes : 0));
  }
  __device__ __forceinline__ unsigned int* seen() const { return reinterpret_cast<unsigned int*>(&barriers() + 1); }

  __device__ __forceinline__ void init_barriers() const {
    Barriers& b = barriers();
    for (int i = 0; i < kWarpgroups; ++i) {
      ptx::mbarrier_init(&b.q_full[i], 1);
      ptx::mbarrier_init(&b.q_free[i], kOwnOut ? 4 : 1);
    }
    ptx::mbarrier_init(&b.v_unseen, 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(&b.k_full[i], 1);
      ptx::mbarrier_init(&b.v_full[i], 1);
      ptx::mbarrier_init(&b.k_free[i], 4 * kWarpgroups);
      ptx::mbarrier_init(&b.v_free[i], 4 * kWarpgroups);
    }
    ptx::fence_mbarrier_init();
  }
};

// The rows that this block computes in a round, which every role asks first. False: none.
template <class Tiles, int kRows>
__device__ __forceinline__ bool find_work(const AttentionSm90Params<typename Tiles::Params>& params, int round,
                                          QueryBlock& block) {
  const AttentionParams& attention = Tiles::attention(params.attention);
  const int units = attention.cu_seqlens_q != nullptr ? attention.heads : attention.batch * attention.heads;
  unsigned int index;
  return params.schedule.find(round, index) && find_block(attention, kRows >> params.pack_log2, units, index, block);
}

// All loads of the block, by one warp.
template <class Tiles, class Smem>
__device__ __forceinline__ void load_work(const AttentionSm90Params<typename Tiles::Params>& params, const Smem& smem) {
  const AttentionParams& attention = Tiles::attention(params.attention);
  typename Smem::Barriers& barriers = smem.barriers();
  const bool leads = ptx::elect_one();
  if (leads) {
    ptx::prefetch_tensormap(&params.q);
    ptx::prefetch_tensormap(&params.k);
    ptx::prefetch_tensormap(&params.v);
  }
  unsigned int tile = 0;
  int q_parity = 0;
  for (int round = 0; round < params.schedule.rounds; ++round) {
    QueryBlock block;
    if (!find_work<Tiles, Smem::kRows>(params, round, block)) continue;
    if (leads) {
      const QueryBlock::Keys keys = block.keys<Smem::kKeys>(Smem::kRows >> params.pack_log2);
      const Tiles tiles(params.attention, block, keys, Smem::kKeys);
      const int batch = attention.cu_seqlens_q != nullptr ? 0 : block.batch, k_head = block.head / attention.sharing;
      const int q_start = static_cast<int>(block.q_start) + block.first, k_start = static_cast<int>(block.k_start);
      const auto load_k = [&](unsigned int tile, int key) {
        unsigned long long* full = &barriers.k_full[Smem::slot(tile)];
        ptx::mbarrier_wait(&barriers.k_free[Smem::slot(tile)], Smem::parity(tile) ^ 1);  // the last K here is read
        ptx::mbarrier_arrive_expect_tx(full, Smem::KTile::kBytes);
        smem.k(Smem::slot(tile)).load(params.k, full, 0, k_start + key, k_head, batch);
      };
      if (tiles.begin < tiles.end) load_k(tile, tiles.key(tiles.begin));  // need not wait for the rows before these
#pragma unroll
      for (int group = 0; group < Smem::kRows / 64; ++group) {
        ptx::mbarrier_wait(&barriers.q_free[group], q_parity ^ 1);  // the last Q is read, its `out` gone
        ptx::mbarrier_arrive_expect_tx(&barriers.q_full[group], Smem::QTile::kBytes);
        smem.q(group).load(params.q, &barriers.q_full[group], 0, q_start + (64 * group >> params.pack_log2), block.head,
                           batch);
      }
      for (int j = tiles.begin; j < tiles.end; ++j, ++tile) {
        const int key = tiles.key(j);
        if (j + 1 < tiles.end) load_k(tile + 1, tiles.key(j + 1));  // needed with this V
        unsigned long long* full = &barriers.v_full[Smem::slot(tile)];
        ptx::mbarrier_wait(&barriers.v_free[Smem::slot(tile)], Smem::parity(tile) ^ 1);  // the last V here is read
        if (!Tiles::kListed && j == 0 && keys.unseen > 0) {
          ptx::mbarrier_arrive(full);
          full = &barriers.v_unseen;  // the warps that waited for it last have released Q since
        }
        ptx::mbarrier_arrive_expect_tx(full, Smem::VTile::kBytes);
        smem.v(Smem::slot(tile)).load(params.v, full, 0, k_start + key, k_head, batch);
      }
    }
    q_parity ^= 1;
  }
}
