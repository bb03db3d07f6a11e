// softmax(scale Q K^T) V of few queries over long, possibly paged keys, in one launch: FlashDecoding, split by work.
//
//   find this block's share of all tiles of keys                                     (attention/key_cursor.cuh)
//   for each (sequence, key head, tile of rows) of it, a segment of tiles:
//     Q -> shared memory
//     each team, for its tiles:  S = Q K^T;  softcap, ALiBi, masks                   (a ring of its own, no block barrier)
//       m' = max(m, rowmax S), where that grew much;  P = exp(S - m');  O = O exp(m - m') + P V;  l likewise
//     the teams' O, m, l -> one                                                      (attention/decode_merge.cuh)
//     of all its keys: out = O / l, lse = m + log l;  of a part: to the workspace, and the last block to come merges
//
// A team of kTeam warps shares tiles of keys, 16 rows each: rows are queries times heads of the group. Its ring goes on
// over segments, so that loads never pause. Shares follow from lengths that only the device knows: nothing is planned or
// read on the host, and a captured graph stays right.
#pragma once

#include <attention/decode_load.cuh>
#include <attention/decode_merge.cuh>
#include <attention/matmul.cuh>
#include <primitives/warp.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/smem.cuh>

template <class Op, int kWarps, int kTeam, int kKeys, int kDim, int kValueDim, int kStages, bool kAnyPage, bool kVector,
          bool kRule>
__global__ void __launch_bounds__(32 * kWarps, 1) attention_decode(const __grid_constant__ DecodeParams p) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Base = ScoreBase<Acc>;
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
  unsigned long long* exists = ptx::static_smem<unsigned long long, kWarps * kStages>() + warp * kStages;
  PartStat<Acc>* stats = ptx::static_smem<PartStat<Acc>, kTeams * kRows>();
  unsigned long long* seen_by = ptx::static_smem<unsigned long long, kRule ? kWarps : 1, 1>();
  int* places = ptx::static_smem<int, kTeams>();  // of the teams' O
  int* last_flag = ptx::static_smem<int, 1, 1>();

  KeyCursor<kKeys> cursor(p);
  const Share share = find_share(cursor, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  if (share.count == 0) return;

  // Loads of this team: every kTeams-th tile of each segment, kStages - 1 tiles ahead of the products.
  KeyCursor<kKeys> loads = cursor;
  TileKeys<kKeys, kAnyPage> keys;
  int at = loads.tile + team;
  const auto find = [&] {
    while (loads.left > 0 && at >= loads.stop) {
      loads.next_segment();
      at = loads.tile + team;
    }
    if (loads.left > 0) keys.look_up(p, loads.b, loads.lengths, at);
  };
  find();
  const auto load = [&](int slot) {
    if (loads.left > 0) {
      const unsigned long long exist = keys.exist(loads.lengths, at);
      if (lane == 0) ptx::st_shared(exists + slot, exist);
      const long long head = loads.head(), first_column = loads.column_tile() * static_cast<long long>(kValueDim);
      const T* k = static_cast<const T*>(p.k) + head * p.k_stride[1];
      const T* v = static_cast<const T*>(p.v) + head * p.v_stride[1] + first_column * p.v_stride[3];
      load_rows<kVector, kTeamThreads>(KTile{ring + slot * kSlot}, k, p.k_stride, p.head_dim, keys, exist);
      load_rows<kVector, kTeamThreads>(VTile{ring + slot * kSlot + kKeys * kDim}, v, p.v_stride,
                                       p.value_dim - static_cast<int>(first_column), keys, exist);
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

  const Acc natural = kRule ? Acc(1) : static_cast<Acc>(p.scale), fold = Base::kUnit * natural;
  int step = 0;        // tiles of this team so far
  long long done = 0;  // units of the block before the segment
  while (cursor.left > 0) {
    const int rows_of_head = p.group * p.q_rows, first_row = cursor.row_tile() * kRows;
    const RowTile rows{p, cursor.b, cursor.head(), first_row, min(kRows, rows_of_head - first_row), cursor.lengths};
    load_queries<kVector, kThreads>(q_tile, rows);
    __syncthreads();  // Q, for every warp

    RowRule<kRule, Acc> rule[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) rule[half] = RowRule<kRule, Acc>(rows, warp_row + lane / 4 + 8 * half);
    const int all_low = __reduce_max_sync(0xffffffff, max(rule[0].low, rule[1].low));
    const int all_high = __reduce_min_sync(0xffffffff, min(rule[0].high, rule[1].high));
    Acc o[1][kDTiles][4] = {};
    Acc l[1][2] = {};
    RowShift<Acc> shift[2];
#pragma unroll 1
    for (int tile = cursor.tile + team; tile < cursor.stop; tile += kTeams, ++step) {
      ptx::cp_async_wait<kStages - 2>();
      team_barrier();
      load((step + kStages - 1) % kStages);
      const int slot = step % kStages, key = tile * kKeys;
      const bool idle = warp_row >= rows.count;  // without rows: loads for its team only

      // S = Q K^T
      Acc s[1][kNTiles][4] = {};
      if (!idle) Op::template scores<kDim>(s, q_tile, warp_row, KTile{ring + slot * kSlot});

      // Softcap, ALiBi, masks.
      [[maybe_unused]] unsigned long long seen = 0;  // by this lane's rows: bit c is key c of the tile
      const unsigned long long exist = ptx::ld_shared(exists + slot);
      constexpr unsigned long long kAll = ~0ULL >> (64 - kKeys % 64) % 64;
      if (kRule || key < all_low || key + kKeys > all_high || (exist & kAll) != kAll) {
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int c = 8 * n + lane % 4 * 2 + e % 2;
            const bool visible = (exist >> c & 1) != 0 && rule[e / 2].sees(p, rows.lengths.kv_len, key + c);
            seen |= static_cast<unsigned long long>(visible && warp_row + lane / 4 + e / 2 * 8 < rows.count) << c;
            s[0][n][e] = visible ? rule[e / 2].score(p, s[0][n][e], key + c) : -Limits<Acc>::infinity();
          }
        }
      }
      const VTile v_tile{ring + slot * kSlot + kKeys * kDim};
      if constexpr (kRule) {
        if (p.mask != nullptr) {
          hide_values<kTeam>(v_tile, seen_by + team * kTeam, seen, exist, team_barrier);
        }
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
    Acc* own = reinterpret_cast<Acc*>(ring + (step + kStages - 1) % kStages * kSlot);
    put_part<Op::kSumsRows>(own, stats + team * kRows, warp_row, o[0], l[0], shift);
    if (lane == 0 && warp_row == 0) ptx::st_shared(places + team, static_cast<int>(own - reinterpret_cast<Acc*>(smem)));
    __syncthreads();  // every team's part
    merge_segment<T, kRows, kTeams, kValueDim, kThreads>(rows, cursor, share, done, stats, reinterpret_cast<Acc*>(smem),
                                                         places, fold, natural, last_flag);
    done += p.split == 0 ? cursor.stop - cursor.tile : 1;
    cursor.next_segment();
    __syncthreads();  // Q, statistics and the slots of O are free
  }
  ptx::cp_async_wait<0>();
}
