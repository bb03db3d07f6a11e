// As attention/wide.cuh, of 64 rows on Hopper's tensor cores: multi-head latent attention of many heads, whose values
// are the first columns of the keys (DeepSeek-V2, arXiv:2405.04434, section 2.1).
//
//   loaders, two warps for each of two slots:  every second tile of keys of each segment -> shared memory
//   for each segment, two warpgroups:  Q -> shared memory
//     scores:  S = Q K0^T
//              for each tile j:  masks;  m' = max(m, rowmax S), where that grew much
//                                P = exp(S - m');  l likewise;  P and exp(m - m') -> values
//                                O = O exp(m - m') + P V, of the left half of the columns of V
//                                S = Q K(j+1)^T    (behind P V, so that the slot of V fills while S is computed)
//     values:  for each tile:    O = O exp(m - m') + P V, of the right half
//     out and lse of all keys; of a part: to the workspace, and the last block to come merges
//
// Accumulators of 64 rows and 512 columns are the registers of two warpgroups, as in FlashMLA (github.com/deepseek-ai/
// FlashMLA, docs/20250422-new-kernel-deep-dive.md), where each of them scores tiles, too.
#pragma once

#include <attention/decode_append.cuh>
#include <attention/decode_merge.cuh>
#include <attention/decode_ring.cuh>
#include <attention/panels.cuh>
#include <attention/softmax_sm90.cuh>
#include <ptx/fence.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/smem.cuh>
#include <ptx/wgmma.cuh>

// Q, two tiles of keys, P of a tile; and what else warps tell each other.
template <class T, int kTileKeys, int kDim, int kValueDim>
struct LatentSmem {
  static constexpr int kKeys = kTileKeys, kRows = 64, kConsumers = 256;
  // Floats from row to row of half of O, in the place of Q: what a warp stores, or reads, meets every bank once.
  static constexpr int kPitch = kValueDim / 2 + 8;
  static_assert(kPitch * sizeof(float) <= kDim * sizeof(T), "there is room");
  enum : int { kConsumerBarrier = 1, kWeightsFull, kWeightsFree, kHalfBarrier };  // the last: and the next one
  using QTile = PanelTile<T, kRows, kDim>;
  using SlotRing = Ring<T, 2, 64, kKeys, kDim, 0, 1, PanelTile>;
  using KTile = typename SlotRing::KTile;
  using Cursor = KeyCursor<kKeys>;

  struct Static {
    unsigned long long full[2], free[2];  // of slots; full: the tile has landed; free: all are done with it
    typename SlotRing::State loaders[4];  // by warp
    Cursor cursor;                        // of this segment
    Shares shares;
    PartStat<float> stats[kRows];  // when all tiles are done
    float rescale[kRows];          // exp(m - m'),
    int grew[4];                   // where that is not 1 in a warp of scores
    unsigned int q_descriptor;     // read for each tile: else its 36 sums would be registers all the time
  };

  T* dynamic;
  Static& own;

  __device__ __forceinline__ QTile q() const { return {dynamic}; }
  __device__ __forceinline__ KTile k(int slot) const { return {dynamic + kRows * kDim + slot * SlotRing::kSlot}; }
  // P as a thread of either warpgroup has it in registers.
  __device__ __forceinline__ uint4* weights(int step) const {
    return reinterpret_cast<uint4*>(k(2).base) + step * 128 + threadIdx.x % 128;
  }
};

// Every second tile of keys of this block's segments, by two warps.
template <class Smem>
__device__ __forceinline__ void load_latent(const DecodeParams& p, const Smem& smem,
                                            const typename Smem::Cursor& cursor) {
  const int loader = static_cast<int>(threadIdx.x - Smem::kConsumers) / 32, slot = loader / 2;
  typename Smem::SlotRing ring(p, smem.k(slot).base, smem.own.loaders + loader, nullptr, slot, false);
  ring.start(cursor);
  for (int parity = 1; ring.more; parity ^= 1) {
    ptx::mbarrier_wait(&smem.own.free[slot], parity);  // the last tile here is read
    ring.load(0);
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();  // what this thread has loaded, before wgmma reads it
    __syncwarp();              // and that of every lane
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&smem.own.full[slot]);
  }
}

// Half of the columns of O -> the segment's, by a warpgroup.
template <int kPitch, class T, int kRows, int kValueDim>
__device__ __forceinline__ void put_half(const PairParts<T, kRows, kValueDim, float>& parts, int half,
                                         const float* sums, const PartStat<float>* stats, float fold) {
  using Sum = RowSum<float>;
  constexpr int kGroups = kValueDim / 2 / Sum::kColumns;
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x) % 128; index < parts.rows.count * kGroups; index += 128) {
    const int row = index / kGroups, group = index % kGroups;
    const PartStat<float> stat = ld_stat(stats + row);
    Sum sum;
    sum.find_shift(1, fold, [&](long long) { return stat; });
    const float* columns = sums + row * kPitch + group * Sum::kColumns;
    sum.add(stat, ptx::ld_shared(reinterpret_cast<const typename Sum::Columns*>(columns)), fold);
    parts.put(row, half * kGroups + group, sum);
  }
}

// All segments, by one of the two warpgroups.
template <bool kScores, class T, int kDim, int kValueDim, class Smem>
__device__ __forceinline__ void attend_latent(const DecodeParams& p, const Smem& smem) {
  using Bits = KeyBits<Smem::kKeys>;
  using KTile = typename Smem::KTile;
  using QTile = typename Smem::QTile;
  constexpr int kKeys = Smem::kKeys, kRows = Smem::kRows, kConsumers = Smem::kConsumers, kHalf = kValueDim / 2;
  constexpr int kSpan = KTile::Layout::kSpan, kQPanel = QTile::Layout::kPanelBytes, kPanel = KTile::Layout::kPanelBytes;
  constexpr int kSlot = KTile::Layout::kBytes / 16, kPanelSteps = kSpan / 32;
  constexpr Bits kAll = static_cast<Bits>(~0ULL >> (64 - kKeys));
  static_assert(kHalf % KTile::kRowPitch == 0, "halves of V are whole panels");
  static_assert((kDim - kValueDim) % KTile::kRowPitch == 0, "and so are the last columns of K");
  static_assert(kDim % 48 == 0, "three chains of whole steps");
  auto& own = smem.own;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = 16 * warp + lane / 4;  // of elements 0, 1, 4, 5 …; the others are 8 further down
  const unsigned int k_descriptor = ptx::wgmma_descriptor(smem.k(0).base, 16);
  const unsigned int v_descriptor =
      ptx::wgmma_descriptor(smem.k(0).base, kPanel) + (kScores ? 0 : kHalf / KTile::kRowPitch * (kPanel / 16));
  int parities = 0;  // bit i: of the next tile in slot i
  const auto await = [&](int slot) {
    ptx::mbarrier_wait(&own.full[slot], parities >> slot & 1);  // the tile has landed
    parities ^= 1 << slot;
  };
  const auto release = [&](int slot) {  // for this warp
    if (lane == 0) ptx::mbarrier_arrive(&own.free[slot]);
  };
  const float natural = static_cast<float>(p.scale), fold = ScoreBase<float>::kUnit * natural;
  if (!kScores) ptx::named_barrier_arrive(Smem::kWeightsFree, kConsumers);  // no P is in shared memory yet

  while (ptx::ld_shared(&own.cursor.left) > 0) {
    const auto cursor = get_shared(&own.cursor);
    const RowTile rows(p, cursor, kRows);
    load_queries<kConsumers, kRows>(smem.q(), rows);
    ptx::fence_proxy_async();                                     // Q, before wgmma reads it
    ptx::named_barrier_sync(Smem::kConsumerBarrier, kConsumers);  // and that of every warp

    float o[kHalf / 2] = {};
    unsigned int weights[kKeys / 16][4];  // P
    const int first = cursor.tile, tiles = cursor.stop - first;
    // Of the pair's columns of V the last ones are the last of K: of two pairs, they may be those of the first, too.
    const int first_column = cursor.column * (kDim - kValueDim);
    const unsigned int values = v_descriptor + first_column / KTile::kRowPitch * (kPanel / 16);
    const auto start_values = [&](int slot) {  // O += P V
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
        ptx::wgmma_rs<T, kHalf, kSpan>(o, weights[i], values + slot * kSlot, true, i * kSpan);
      }
      ptx::wgmma_commit();
    };
    if constexpr (kScores) {
      float s[kKeys / 2], s_last[kKeys / 2];
      OnlineSoftmax online;
      int low[2], high[2];  // this lane's rows see keys low … high - 1; those that are padding, all
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool none = rows.is_padding(row + 8 * half);
        const int query = none ? 0 : rows.query(row + 8 * half);
        low[half] = none ? 0 : rows.lengths.low(p, query);
        high[half] = none ? 0x7fffffff : rows.lengths.high(p, query);
      }
      // S = Q K^T in three chains of products: each adds up a third of the columns, as tensor cores truncate every sum.
      constexpr int kChain = kDim / 16 / 3;
      const auto chain = [&](float (&sum)[kKeys / 2], int slot, int third) {
        const unsigned int q = ptx::ld_shared(&own.q_descriptor);
#pragma unroll
        for (int i = 0; i < kChain; ++i) {
          const int step = third * kChain + i, panel = step / kPanelSteps, in_panel = step % kPanelSteps * 32;
          ptx::wgmma_ss<T, kKeys, kSpan>(sum, q, k_descriptor + slot * kSlot, i > 0, (panel * kQPanel + in_panel) / 16,
                                         (panel * kPanel + in_panel) / 16);
        }
      };
      const auto start_scores = [&](int slot) {
        chain(s, slot, 0);
        chain(s_last, slot, 1);
        ptx::wgmma_commit();
      };
      const auto finish_scores = [&](int slot) {
        ptx::wgmma_wait<0>();  // two chains are complete
#pragma unroll
        for (int r = 0; r < kKeys / 2; ++r) s[r] += s_last[r];
        ptx::wgmma_fence(s);  // hands s_last to the tensor cores
        chain(s_last, slot, 2);
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();  // S is complete
#pragma unroll
        for (int r = 0; r < kKeys / 2; ++r) s[r] += s_last[r];
      };
      const auto softmax = [&](int j) {  // S of tile j -> P; O = O exp(m - m')
        const int key = (first + j) * kKeys;
        const Bits exist = ptx::ld_shared(own.loaders[j % 2 * 2].exists);
        const bool edge = key < max(low[0], low[1]) || key + kKeys > min(high[0], high[1]);
        if (__any_sync(0xffffffff, edge || exist != kAll)) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int from = min(max(low[half] - key, 0), kKeys), to = min(max(high[half] - key, 0), kKeys);
            Bits seen = from < to ? exist & kAll << from & kAll >> (kKeys - to) : Bits(0);
            seen >>= lane % 4 * 2;
#pragma unroll
            for (int r = 2 * half; r < kKeys / 2; r += 4) {
              if (!(seen >> column_of(r) & 1)) s[r] = -Limits<float>::infinity();
              if (!(seen >> column_of(r + 1) & 1)) s[r + 1] = -Limits<float>::infinity();
            }
          }
        }
        const bool grew = online.step(s, fold);
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
          for (int e = 0; e < 4; ++e) weights[i][e] = ptx::cvt_rn_x2<T>(s[8 * i + 2 * e], s[8 * i + 2 * e + 1]);
        }
        ptx::named_barrier_sync(Smem::kWeightsFree, kConsumers);  // values has read those of the tile before
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          ptx::st_shared(smem.weights(i), uint4{weights[i][0], weights[i][1], weights[i][2], weights[i][3]});
        }
        if (lane == 0) ptx::st_shared(own.grew + warp, static_cast<int>(grew));
        if (grew) {
          if (lane % 4 == 0) {
            ptx::st_shared(own.rescale + row, online.rescale[0]);
            ptx::st_shared(own.rescale + row + 8, online.rescale[1]);
          }
#pragma unroll
          for (int r = 0; r < kHalf / 2; ++r) o[r] *= online.rescale[row_half(r)];
        }
        ptx::named_barrier_arrive(Smem::kWeightsFull, kConsumers);
      };

      await(0);
      ptx::wgmma_fence();  // hands S to the tensor cores
      start_scores(0);
      finish_scores(0);
      softmax(0);
#pragma unroll 1
      for (int j = 1; j < tiles; ++j) {
        ptx::wgmma_fence(o);  // hands P, O and S to the tensor cores
        start_values((j - 1) % 2);
        await(j % 2);
        start_scores(j % 2);
        ptx::wgmma_wait<1>();  // O is complete, and V is read
        release((j - 1) % 2);
        finish_scores(j % 2);
        softmax(j);
      }
      ptx::wgmma_fence(o);  // hands P and O to the tensor cores
      start_values((tiles - 1) % 2);
      ptx::wgmma_wait<0>();  // O is complete, and V is read
      release((tiles - 1) % 2);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = group_sum<4>(online.l[half]);
        if (lane % 4 == 0) put_stat(own.stats + row + 8 * half, online.shift[half], total);
      }
    } else {
#pragma unroll 1
      for (int j = 0; j < tiles; ++j) {
        ptx::named_barrier_sync(Smem::kWeightsFull, kConsumers);
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) {
          const uint4 words = ptx::ld_shared(smem.weights(i));
          weights[i][0] = words.x, weights[i][1] = words.y, weights[i][2] = words.z, weights[i][3] = words.w;
        }
        if (ptx::ld_shared(own.grew + warp) != 0) {  // O = O exp(m - m')
          const float rescale[2] = {ptx::ld_shared(own.rescale + row), ptx::ld_shared(own.rescale + row + 8)};
#pragma unroll
          for (int r = 0; r < kHalf / 2; ++r) o[r] *= rescale[row_half(r)];
        }
        ptx::named_barrier_arrive(Smem::kWeightsFree, kConsumers);
        await(j % 2);
        ptx::wgmma_fence();  // hands P and O to the tensor cores
        start_values(j % 2);
        ptx::wgmma_wait<0>();  // O is complete, and V is read
        release(j % 2);
      }
    }

    // out and lse of all keys; of a part: to the workspace, and the last block to come merges
    auto done = get_shared(&own.cursor);
    const RowTile merged(p, done, kRows);
    const PairParts<T, kRows, kValueDim, float> parts(merged, done, get_shared(&own.shares), first_column, natural);
    float* const sums = reinterpret_cast<float*>(smem.q().base);                // of half of the columns
    if (!kScores) ptx::named_barrier_sync(Smem::kConsumerBarrier, kConsumers);  // that of scores is read
    using Pair = Fragment<float, 2>;
#pragma unroll
    for (int r = 0; r < kHalf / 2; r += 2) {
      float* to = sums + row * Smem::kPitch + lane % 4 * 2 + 8 * row_half(r) * Smem::kPitch + column_of(r);
      ptx::st_shared(reinterpret_cast<Pair*>(to), Pair{o[r], o[r + 1]});
    }
    ptx::named_barrier_sync(Smem::kHalfBarrier + (kScores ? 0 : 1), 128);  // O of every warp of this half
    put_half<Smem::kPitch>(parts, kScores ? 0 : 1, sums, own.stats, fold);
    if (kScores) ptx::named_barrier_sync(Smem::kConsumerBarrier, kConsumers);  // the memory is free for that of values
    parts.template merge<kConsumers>(fold, static_cast<int>(Smem::kConsumerBarrier), kConsumers);
    done.next_segment(p);
    ptx::named_barrier_sync(Smem::kConsumerBarrier, kConsumers);  // all are done with Q and the cursor
    if (kScores && threadIdx.x == 0) put_shared(&own.cursor, done);
    ptx::named_barrier_sync(Smem::kConsumerBarrier, kConsumers);  // the next one
  }
}

template <class T, int kKeys, int kDim, int kValueDim>
__global__ void __launch_bounds__(384, 1) attention_latent_sm90(const __grid_constant__ DecodeParams p) {
  using Smem = LatentSmem<T, kKeys, kDim, kValueDim>;
  // Of 64 K registers: what each role needs. Above them ptxas would spill.
  constexpr int kScoresRegisters = 240, kValuesRegisters = 176, kLoaderRegisters = 88;

  const Smem smem{ptx::dynamic_smem<T, 1024>(), *ptx::static_smem<typename Smem::Static, 1>()};
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
  Shares shares;
  const KeyCursor<kKeys> cursor =
      find_share<kKeys>(p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), shares);
  if (p.k_new != nullptr) append_rows<12, T>(p);
  if (cursor.left == 0) return;
  if (threadIdx.x == 0) {
    put_shared(&smem.own.shares, shares);
    put_shared(&smem.own.cursor, cursor);
    ptx::st_shared(&smem.own.q_descriptor, ptx::wgmma_descriptor(smem.q().base, 16));
    for (int slot = 0; slot < 2; ++slot) {
      ptx::mbarrier_init(&smem.own.full[slot], 2);
      ptx::mbarrier_init(&smem.own.free[slot], 8);
    }
  }
  __syncthreads();  // the mbarriers are initialised, and all else is there, before any warp uses it

  if (warp >= 8) {
    ptx::setmaxnreg_dec<kLoaderRegisters>();
    load_latent(p, smem, cursor);
  } else if (warp >= 4) {
    ptx::setmaxnreg_inc<kValuesRegisters>();
    attend_latent<false, T, kDim, kValueDim>(p, smem);
  } else {
    ptx::setmaxnreg_inc<kScoresRegisters>();
    attend_latent<true, T, kDim, kValueDim>(p, smem);
  }
}
