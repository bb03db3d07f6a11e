// As attention/decode.cuh, of rows that are wider than the accumulators of a warp: kColumnWarps warps share 16 of them.
//
//     S_w = Q K^T over the columns of K of warp w        -> shared memory
//     S = S_0 + S_1 + …;  m, P, l: every warp of the group by itself, and alike
//     O_w = O_w exp(m - m') + P V over the columns of V of warp w
//
// kShared: V is the first columns of K, which is in shared memory once, as in multi-head latent attention (DeepSeek-V2,
// arXiv:2405.04434, section 2.1). One team has the whole block, so that nothing is merged within it.
#pragma once

#include <attention/decode_append.cuh>
#include <attention/decode_merge.cuh>
#include <attention/decode_queries.cuh>
#include <attention/decode_ring.cuh>
#include <attention/decode_softmax.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/smem.cuh>

// Parts of the scores of a row group: kParts warps, 16 bytes of a lane at a time.
template <class Acc, int kParts, int kNTiles>
struct ScoreParts {
  static constexpr int kPer = 16 / sizeof(Acc), kChunks = 4 / kPer, kSize = kNTiles * 4 * 32;  // elements of a part
  using Chunk = Fragment<Acc, kPer>;
  Acc* base;

  __device__ __forceinline__ Chunk* chunk(int part, int n, int i) const {
    return reinterpret_cast<Chunk*>(base + part * kSize) + (n * kChunks + i) * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ void put(int part, const Acc (&s)[1][kNTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        Chunk values;
#pragma unroll
        for (int e = 0; e < kPer; ++e) values.element[e] = s[0][n][i * kPer + e];
        ptx::st_shared(chunk(part, n, i), values);
      }
    }
  }
  // In the same order for every warp.
  __device__ __forceinline__ void sum(Acc (&s)[1][kNTiles][4]) const {
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const Chunk values = ptx::ld_shared(chunk(part, n, i));
#pragma unroll
          for (int e = 0; e < kPer; ++e) {
            Acc& score = s[0][n][i * kPer + e];
            score = part == 0 ? values.element[e] : score + values.element[e];
          }
        }
      }
    }
  }
};

template <class Op, int kWarps, int kColumnWarps, int kKeys, int kDim, int kValueDim, int kStages, bool kShared,
          class Score>
__global__ void __launch_bounds__(32 * kWarps, 1) attention_wide(const __grid_constant__ DecodeParams p) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Rule = RowRule<Acc>;
  constexpr int kThreads = 32 * kWarps, kRowWarps = kWarps / kColumnWarps, kRows = 16 * kRowWarps;
  constexpr int kGroupThreads = 32 * kColumnWarps;
  constexpr int kLoaders = kKeys < 16 ? 64 : 128;  // threads, which share whole steps of rows
  constexpr int kNTiles = kKeys / 8, kColumns = kValueDim / kColumnWarps, kDTiles = kColumns / 8;
  using QTile = Tile<T, kRows, kDim>;
  using BlockRing = Ring<T, 1, kLoaders, kKeys, kDim, kShared ? 0 : kValueDim, kStages>;
  using VTile = typename Select<kShared, typename BlockRing::KTile, typename BlockRing::VTile>::Type;
  using Bits = typename BlockRing::Bits;
  using Parts = ScoreParts<Acc, kColumnWarps, kNTiles>;
  static_assert(kColumns / VTile::kPerChunk % VTile::kRepeat == 0, "columns of a warp are a tile by themselves");
  static_assert((kDim - kValueDim) / VTile::kPerChunk % VTile::kRepeat == 0, "and so are those of a second pair");
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int row_warp = warp / kColumnWarps, warp_row = 16 * row_warp, part = warp % kColumnWarps;

  T* smem = ptx::dynamic_smem<T>();
  const QTile q_tile{smem};
  T* slots = smem + kRows * kDim;
  const Parts score_parts{reinterpret_cast<Acc*>(slots + kStages * BlockRing::kSlot) +
                          row_warp * kColumnWarps * Parts::kSize};
  Bits* seen_by = ptx::static_smem<Bits, kWarps>();
  Rule* rules = ptx::static_smem<Rule, kRows>();
  KeyCursor<kKeys>* of_block = ptx::static_smem<KeyCursor<kKeys>, 1>();  // between the ends of a segment
  Shares* shared_shares = ptx::static_smem<Shares, 1>();
  typename BlockRing::State* states = ptx::static_smem<typename BlockRing::State, kLoaders / 32>();
  const bool loads = warp < kLoaders / 32;
  BlockRing ring(p, slots, states + (loads ? warp : 0), ptx::static_smem<float, kStages * BlockRing::kScales>(), 0,
                 warp == 0);

  Shares shares;
  KeyCursor<kKeys> cursor = find_share<kKeys>(p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), shares);
  if (cursor.left == 0) {
    if (p.k_new != nullptr) append_rows<kWarps, T>(p);
    return;
  }
  if (threadIdx.x == 0) put_shared(shared_shares, shares);
  if (loads) {
    ring.start(cursor);
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) ring.load(stage);
  }
  if (p.k_new != nullptr) append_rows<kWarps, T>(p);

  const auto block_barrier = [] { __syncthreads(); };
  const Acc natural = p.rule ? Acc(1) : static_cast<Acc>(p.scale), fold = ScoreBase<Acc>::kUnit * natural;
  int slot = 0;  // of the next tile
  while (cursor.left > 0) {
    const RowTile rows(p, cursor, kRows);
    load_queries<kThreads, kRows>(q_tile, rows);
    if (warp < kRowWarps && lane < 16) Rule::put(rules, rows, 16 * warp + lane);
    if (threadIdx.x == 0) put_shared(of_block, cursor);
    __syncthreads();  // Q, the rules of its rows and the cursor, for every warp

    const WarpRules<Acc, Score> warp_rules(rules + warp_row, rows.b);
    const bool idle = warp_row >= rows.count;  // a group without rows: loads only
    const Queries<Op, QTile, kDim, kColumnWarps, sizeof(T) == 2 && kRowWarps == 1> q(q_tile, warp_row, part);
    Acc o[1][kDTiles][4] = {};
    Acc l[1][2] = {};
    RowShift<Acc> shift[2];
    // Of the pair's columns of V the last ones are the last of K: of two pairs, they may be those of the first, too.
    const int first_column = cursor.column * (kDim - kValueDim), own_column = first_column + part * kColumns;
#pragma unroll 1
    for (int tile = cursor.tile, stop = cursor.stop; tile < stop; ++tile) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // the tile has landed; all are done with the one before, its slot and the parts of its scores
      const int now = slot;
      if (loads) ring.load(ring.before(now));
      slot = ring.after(now);
      ring.template convert<kThreads>(now, block_barrier);
      const Bits exist = ptx::ld_shared(states->exists + now);

      // S_w = Q K^T;  S = S_0 + S_1 + …;  softcap, ALiBi, Score, masks
      Acc s[1][kNTiles][4] = {};
      if (!idle) {
        q.scores(s, ring.k_tile(now));
        score_parts.put(part, s);
        ptx::named_barrier_sync(1 + row_warp, kGroupThreads);  // the parts of all warps of the group
        score_parts.sum(s);
      }
      const Bits seen = warp_rules.apply(p, s, tile * kKeys, exist);
      const VTile v_tile{kShared ? ring.k_tile(now).base : ring.v_tile(now).base};
      if (p.mask != nullptr) hide_values<kWarps>(v_tile, seen_by, seen, exist, block_barrier);
      if (idle) continue;

      // m' = max(m, rowmax S), where that grew much;  P = exp(S - m');  O_w = O_w exp(m - m') + P V;  l likewise
      softmax_step<Op::kSumsRows>(s, o, l, shift, fold);
      Op::values(o, l, s, VTile{v_tile.base + own_column});
    }

    // out and lse of all keys; of a part: to the workspace, and the last block to come merges
    cursor = get_shared(of_block);
    const RowTile merged(p, cursor, kRows);
    const PairParts<T, kRows, kValueDim, Acc> parts(merged, cursor, get_shared(shared_shares), first_column, natural);
    put_columns<Op::kSumsRows>(parts, warp_row, part * kColumns / RowSum<Acc>::kColumns, o[0], l[0], shift);
    parts.template merge<kThreads>(fold);
    cursor.next_segment(p);
    __syncthreads();  // Q, its rules and the cursor are free
  }
}
