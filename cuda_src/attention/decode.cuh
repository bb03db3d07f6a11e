// softmax(scale Q K^T) V of few queries over long, possibly paged keys, in one launch: FlashDecoding, split by work.
//
//   find this block's share of all tiles of keys                                     (attention/key_cursor.cuh)
//   for each (sequence, key head, tile of rows) of it, a segment of tiles:
//     Q -> shared memory
//     each team, for its tiles, from a ring of its own:  S = Q K^T;  softcap, ALiBi, masks
//       m' = max(m, rowmax S), where that grew much;  P = exp(S - m');  O = O exp(m - m') + P V;  l likewise
//     the teams' O, m, l -> one                                                      (attention/decode_merge.cuh)
//     of all its keys: out = O / l, lse = m + log l;  of a part: to the workspace, and the last block to come merges
//
// A team of kTeam warps shares tiles of keys, 16 rows each: rows are queries times heads of the group. Its ring goes on
// over segments, so that loads never pause. Shares follow from lengths that only the device knows: nothing is planned
// or read on the host, and a captured graph stays right.
#pragma once

#include <attention/decode_append.cuh>
#include <attention/decode_eight_bits.cuh>
#include <attention/decode_merge.cuh>
#include <attention/decode_queries.cuh>
#include <primitives/warp.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/smem.cuh>

template <class Op, int kWarps, int kTeam, int kKeys, int kDim, int kValueDim, int kStages>
__global__ void __launch_bounds__(32 * kWarps, 1) attention_decode(const __grid_constant__ DecodeParams p) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Base = ScoreBase<Acc>;
  using Rule = RowRule<Acc>;
  constexpr int kThreads = 32 * kWarps, kTeams = kWarps / kTeam, kTeamThreads = 32 * kTeam, kRows = 16 * kTeam;
  constexpr int kNTiles = kKeys / 8, kDTiles = kValueDim / 8;
  using QTile = Tile<T, kRows, kDim>;
  using KTile = Tile<T, kKeys, kDim>;
  using VTile = Tile<T, kKeys, kValueDim>;
  constexpr int kSlot = kKeys * (kDim + kValueDim);  // elements
  static_assert(kSlot * sizeof(T) >= kRows * kValueDim * sizeof(Acc), "a slot holds the O of its team");
  static_assert(kKeys % 8 == 0 && kKeys <= 64 && kWarps % kTeam == 0, "whole tiles of mma, a bit for each key");
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int team = warp / kTeam, warp_row = warp % kTeam * 16;

  T* smem = ptx::dynamic_smem<T>();
  const QTile q_tile{smem};
  T* ring = smem + kRows * kDim + team * kStages * kSlot;
  using Bits = KeyBits<kKeys>;
  Bits* exists = ptx::static_smem<Bits, kWarps * kStages>() + warp * kStages;
  Bits* seen_by = ptx::static_smem<Bits, kWarps, 1>() + team * kTeam;
  Rule* rules = ptx::static_smem<Rule, kRows>();
  PartStat<Acc>* stats = ptx::static_smem<PartStat<Acc>, kTeams * kRows>();
  int* places = ptx::static_smem<int, kTeams>();  // of the teams' O

  KeyCursor<kKeys>* of_block = ptx::static_smem<KeyCursor<kKeys>, kWarps + 1>();  // between the ends of a segment
  KeyCursor<kKeys>* of_loads = of_block + 1 + warp;
  LoadSegment* segment = ptx::static_smem<LoadSegment, kWarps>() + warp;
  Shares* shared_shares = ptx::static_smem<Shares, 1>();

  Shares shares;
  KeyCursor<kKeys> cursor = find_share<kKeys>(p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), shares);
  if (cursor.left == 0) {
    if (p.k_new != nullptr) append_rows<kWarps, T>(p);
    return;
  }
  if (threadIdx.x == 0) put_shared(shared_shares, shares);

  // Loads of this team: every kTeams-th tile of each segment, kStages - 1 tiles ahead of the products.
  TileKeys<kKeys> keys;
  int at = cursor.tile + team, loads_stop = cursor.stop;
  bool more = true;
  const auto save = [&](const KeyCursor<kKeys>& loads) {
    __syncwarp();  // all lanes have read what this overwrites
    if (lane == 0) {
      put_shared(of_loads, loads);
      put_shared(segment, LoadSegment(p, loads, kValueDim, sizeof(T)));
    }
    __syncwarp();  // and now read it
  };
  const auto find = [&] {
    if (more && at >= loads_stop) {
      KeyCursor<kKeys> loads = get_shared(of_loads);
      do {
        loads.next_segment(p);
        at = loads.tile + team;
        more = loads.left > 0;
      } while (more && at >= loads.stop);
      loads_stop = loads.stop;
      if (more) save(loads);
    }
    if (more) keys.look_up(p, segment, at * kKeys);
  };
  save(cursor);
  find();
  // Of caches of 8 bits: the bytes of a slot, at its end, and the scales of their rows.
  const auto bytes_of = [&](int slot) {
    return reinterpret_cast<unsigned char*>(ring + (slot + 1) * kSlot) - kKeys * (kDim + kValueDim);
  };
  float* row_scales = ptx::static_smem<float, kTeams * 2 * kKeys * kStages>() + team * 2 * kKeys * kStages;
  RowScales<kKeys> scales;
  const auto load = [&](int slot) {
    if (warp_row == 0) scales.put(row_scales + 2 * kKeys * (slot == 0 ? kStages - 1 : slot - 1));  // of the last load
    if (more) {
      const KTile k_tile{ring + slot * kSlot};
      const VTile v_tile{ring + slot * kSlot + kKeys * kDim};
      const int first = at * kKeys;
      const Bits exist = keys.exist(ptx::ld_shared(&segment->begin), ptx::ld_shared(&segment->end), first);
      if (lane == 0) ptx::st_shared(exists + slot, exist);
      if (p.is_async && p.cache_kind != kCacheOfT) {
        unsigned char* bytes = bytes_of(slot);
        load_bytes<kTeamThreads, kKeys, kDim>(bytes, ptx::ld_shared(&segment->k.base), p.k_stride, p.head_dim, keys,
                                              exist);
        load_bytes<kTeamThreads, kKeys, kValueDim>(bytes + kKeys * kDim, ptx::ld_shared(&segment->v.base), p.v_stride,
                                                   ptx::ld_shared(&segment->value_columns), keys, exist);
        if (warp_row == 0) scales.load(p, segment, keys, exist);
      } else if (p.is_async) {
        load_chunks<kTeamThreads>(p, k_tile, v_tile, segment, keys, first, exist);
      } else {
        const int fresh = ptx::ld_shared(&segment->old) - first;  // row of the first new key
        load_elements<kTeamThreads>(p, k_tile, &segment->k, p.k_stride, p.k_new_stride, p.k_scale_stride, p.head_dim,
                                    keys, fresh, exist);
        load_elements<kTeamThreads>(p, v_tile, &segment->v, p.v_stride, p.v_new_stride, p.v_scale_stride,
                                    ptx::ld_shared(&segment->value_columns), keys, fresh, exist);
      }
      at += kTeams;
      find();
    }
    ptx::cp_async_commit();  // one group per tile, empty at the end, so that waits can count them
  };
  // What the team has begun to load has landed for all of its warps, and all are done with the tile before.
  const auto team_barrier = [&] {
    if constexpr (kTeam == 1) {
      __syncwarp();
    } else {
      ptx::named_barrier_sync(1 + team, kTeamThreads);
    }
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) load(stage);
  if (p.k_new != nullptr) append_rows<kWarps, T>(p);

  const Acc natural = p.rule ? Acc(1) : static_cast<Acc>(p.scale), fold = Base::kUnit * natural;
  int slot = 0;  // of this team's next tile
  while (cursor.left > 0) {
    const RowTile rows(p, cursor, kRows);
    load_queries<kThreads>(q_tile, rows);
    if (warp < kTeam && lane < 16) Rule::put(rules, rows, 16 * warp + lane);
    if (threadIdx.x == 0) put_shared(of_block, cursor);
    __syncthreads();  // Q, the rules of its rows and the cursor, for every warp

    const Rule of_lane = get_shared(rules + warp_row + lane % 16);
    const int all_low = __reduce_max_sync(0xffffffff, of_lane.low);
    const int all_high = __reduce_min_sync(0xffffffff, of_lane.high);
    const bool idle = warp_row >= rows.count;  // without rows: loads for its team only
    const Queries<Op, QTile, kDim> q(q_tile, warp_row);
    Acc o[1][kDTiles][4] = {};
    Acc l[1][2] = {};
    RowShift<Acc> shift[2];
#pragma unroll 1
    for (int tile = cursor.tile + team, stop = cursor.stop; tile < stop; tile += kTeams) {
      ptx::cp_async_wait<kStages - 2>();
      team_barrier();
      load(slot == 0 ? kStages - 1 : slot - 1);
      const int now = slot;
      T* const k_rows = ring + now * kSlot;
      const Bits exist = ptx::ld_shared(exists + now);
      const VTile v_tile{k_rows + kKeys * kDim};
      const int key = tile * kKeys;
      slot = slot == kStages - 1 ? 0 : slot + 1;

      if (p.is_async && p.cache_kind != kCacheOfT) {
        const unsigned char* bytes = bytes_of(now);
        const float* of_rows = row_scales + 2 * kKeys * now;
        convert_rows<kTeamThreads>(p, KTile{k_rows}, bytes, p.k_scale != nullptr, of_rows, team_barrier);
        convert_rows<kTeamThreads>(p, v_tile, bytes + kKeys * kDim, p.v_scale != nullptr, of_rows + kKeys,
                                   team_barrier);
        team_barrier();  // the tile, before any warp multiplies with it
      }

      // S = Q K^T
      Acc s[1][kNTiles][4] = {};
      if (!idle) q.scores(s, KTile{k_rows});

      // Softcap, ALiBi, masks.
      constexpr Bits kAll = static_cast<Bits>(~0ULL >> (64 - kKeys));
      if (p.rule || key < all_low || key + kKeys > all_high || (exist & kAll) != kAll) {
        Bits seen = 0;  // by this lane's rows: bit c is key c of the tile
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp_row + lane / 4 + 8 * half;
          const Rule rule = get_shared(rules + row);
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int c = 8 * n + lane % 4 * 2 + e;
              const bool visible = (exist >> c & 1) != 0 && rule.sees(p, key + c);
              Acc& score = s[0][n][2 * half + e];
              seen |= static_cast<Bits>(visible && rule.low >= 0) << c;
              if (p.rule) score = rule.score(p, score, key + c);
              score = visible ? score : -Limits<Acc>::infinity();
            }
          }
        }
        if (p.mask != nullptr) hide_values<kTeam>(v_tile, seen_by, seen, exist, team_barrier);
      }
      if (idle) continue;

      // m' = max(m, rowmax S), where that grew much
      Acc best[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        best[half] = s[0][0][2 * half];
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          best[half] = max_number(best[half], max_number(s[0][n][2 * half], s[0][n][2 * half + 1]));
        }
        best[half] = group_max<4>(best[half]);
      }
      if (__any_sync(0xffffffff, shift[0].exceeded(best[0]) || shift[1].exceeded(best[1]))) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Acc rescale = shift[half].move(best[half], fold);
          l[0][half] *= rescale;
#pragma unroll
          for (int d = 0; d < kDTiles; ++d) {
            o[0][d][2 * half] *= rescale;
            o[0][d][2 * half + 1] *= rescale;
          }
#pragma unroll
          for (int n = 0; n < kNTiles; ++n) {
            s[0][n][2 * half] -= shift[half].center;
            s[0][n][2 * half + 1] -= shift[half].center;
          }
        }
      }

      // P = exp(S - m'), l += rowsum P, O += P V
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          Acc& weight = s[0][n][e];
          weight = Base::exp(::fma(weight, fold, -shift[e / 2].base));
          if constexpr (!Op::kSumsRows) l[0][e / 2] += weight;
        }
      }
      Op::values(o, l, s, v_tile);
    }

    // The teams' O, m, l -> one.
    team_barrier();  // every warp of the team has read its last tile, whose slot O takes
    Acc* own = reinterpret_cast<Acc*>(ring + (slot == 0 ? kStages - 1 : slot - 1) * kSlot);
    put_part<Op::kSumsRows>(own, stats + team * kRows, warp_row, o[0], l[0], shift);
    if (lane == 0 && warp_row == 0) ptx::st_shared(places + team, static_cast<int>(own - reinterpret_cast<Acc*>(smem)));
    __syncthreads();  // every team's part
    cursor = get_shared(of_block);
    merge_segment<T, kRows, kTeams, kValueDim, kThreads>(RowTile(p, cursor, kRows), cursor, get_shared(shared_shares),
                                                         stats, reinterpret_cast<Acc*>(smem), places, fold, natural);
    cursor.next_segment(p);
    __syncthreads();  // Q, its rules, statistics and the slots of O are free
  }
}
