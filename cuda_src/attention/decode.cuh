// softmax(scale Q K^T) V of few queries over long, possibly paged keys, in one launch: FlashDecoding, split by work.
//
//   find this block's share of all tiles of keys                                     (attention/key_cursor.cuh)
//   for each (sequence, key head, tile of rows) of it, a segment of tiles:
//     Q -> shared memory
//     each team, for its tiles, from a ring of its own:  S = Q K^T;  softcap, ALiBi, Score, masks
//       m' = max(m, rowmax S), where that grew much;  P = exp(S - m');  O = O exp(m - m') + P V;  l likewise
//     the teams' O, m, l -> one                                                      (attention/decode_merge.cuh)
//     of all its keys: out = O / l, lse = m + log l;  of a part: to the workspace, and the last block to come merges
//
// A team of kTeam warps shares tiles of keys, 16 rows each: rows are queries times heads of the group. Its ring goes on
// over segments, so that loads never pause. Shares follow from lengths that only the device knows: nothing is planned
// or read on the host, and a captured graph stays right.
#pragma once

#include <attention/decode_append.cuh>
#include <attention/decode_merge.cuh>
#include <attention/decode_queries.cuh>
#include <attention/decode_ring.cuh>
#include <attention/decode_softmax.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/smem.cuh>

template <class Op, int kWarps, int kTeam, int kKeys, int kDim, int kValueDim, int kStages, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1) attention_decode(const __grid_constant__ DecodeParams p) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  using Rule = RowRule<Acc>;
  constexpr int kThreads = 32 * kWarps, kTeams = kWarps / kTeam, kTeamThreads = 32 * kTeam, kRows = 16 * kTeam;
  constexpr int kNTiles = kKeys / 8, kDTiles = kValueDim / 8;
  using QTile = Tile<T, kRows, kDim>;
  constexpr bool kHeld = sizeof(T) == 2 && kDim <= 128 && (kKeys < 64 || kTeams > 1);  // else sm_86 spills
  static_assert(kKeys % 8 == 0 && kKeys <= 64 && kWarps % kTeam == 0, "whole tiles of mma, a bit for each key");
  static_assert(kKeys * (kDim + kValueDim) * sizeof(T) >= kRows * kValueDim * sizeof(Acc), "a slot holds a team's O");
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const int team = warp / kTeam, warp_row = warp % kTeam * 16;

  T* smem = ptx::dynamic_smem<T>();
  const QTile q_tile{smem};
  using TeamRing = Ring<T, kTeams, kTeamThreads, kKeys, kDim, kValueDim, kStages>;
  using Bits = typename TeamRing::Bits;
  Bits* seen_by = ptx::static_smem<Bits, kWarps>() + team * kTeam;
  Rule* rules = ptx::static_smem<Rule, kRows>();
  PartStat<Acc>* stats = ptx::static_smem<PartStat<Acc>, kTeams * kRows>();
  int* places = ptx::static_smem<int, kTeams>();                         // of the teams' O
  KeyCursor<kKeys>* of_block = ptx::static_smem<KeyCursor<kKeys>, 1>();  // between the ends of a segment
  Shares* shared_shares = ptx::static_smem<Shares, 1>();
  TeamRing ring(p, smem + kRows * kDim + team * kStages * TeamRing::kSlot,
                ptx::static_smem<typename TeamRing::State, kWarps>() + warp,
                ptx::static_smem<float, kTeams * kStages * TeamRing::kScales>() + team * kStages * TeamRing::kScales,
                team, warp_row == 0);

  Shares shares;
  KeyCursor<kKeys> cursor = find_share<kKeys>(p, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x), shares);
  if (cursor.left == 0) {
    if (p.k_new != nullptr) append_rows<kWarps, T>(p);
    return;
  }
  if (threadIdx.x == 0) put_shared(shared_shares, shares);
  // What the team has begun to load has landed for all of its warps, and all are done with the tile before.
  const auto team_barrier = [&] {
    if constexpr (kTeam == 1) {
      __syncwarp();
    } else {
      ptx::named_barrier_sync(1 + team, kTeamThreads);
    }
  };
  ring.start(cursor);
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) ring.load(stage);
  if (p.k_new != nullptr) append_rows<kWarps, T>(p);

  const Acc natural = p.rule ? Acc(1) : static_cast<Acc>(p.scale), fold = ScoreBase<Acc>::kUnit * natural;
  int slot = 0;  // of this team's next tile
  while (cursor.left > 0) {
    const RowTile rows(p, cursor, kRows);
    load_queries<kThreads, kRows>(q_tile, rows);
    if (warp < kTeam && lane < 16) Rule::put(rules, rows, 16 * warp + lane);
    if (threadIdx.x == 0) put_shared(of_block, cursor);
    __syncthreads();  // Q, the rules of its rows and the cursor, for every warp

    const WarpRules<Acc, Score> warp_rules(rules + warp_row, rows.b);
    const bool idle = warp_row >= rows.count;  // without rows: loads for its team only
    const Queries<Op, QTile, kDim, 1, kHeld> q(q_tile, warp_row);
    Acc o[1][kDTiles][4] = {};
    Acc l[1][2] = {};
    RowShift<Acc> shift[2];
#pragma unroll 1
    for (int tile = cursor.tile + team, stop = cursor.stop; tile < stop; tile += kTeams) {
      ptx::cp_async_wait<kStages - 2>();
      team_barrier();
      const int now = slot;
      ring.load(ring.before(now));
      slot = ring.after(now);
      ring.template convert<kTeamThreads>(now, team_barrier);
      const Bits exist = ptx::ld_shared(ring.state->exists + now);

      // S = Q K^T;  softcap, ALiBi, Score, masks
      Acc s[1][kNTiles][4] = {};
      if (!idle) q.scores(s, ring.k_tile(now));
      const Bits seen = warp_rules.apply(p, s, tile * kKeys, exist);
      if (p.mask != nullptr) hide_values<kTeam>(ring.v_tile(now), seen_by, seen, exist, team_barrier);
      if (idle) continue;

      // m' = max(m, rowmax S), where that grew much;  P = exp(S - m');  O = O exp(m - m') + P V;  l likewise
      softmax_step<Op::kSumsRows>(s, o, l, shift, fold);
      Op::values(o, l, s, ring.v_tile(now));
    }

    // The teams' O, m, l -> one.
    team_barrier();  // every warp of the team has read its last tile, whose slot O takes
    Acc* own = reinterpret_cast<Acc*>(ring.slots + ring.before(slot) * TeamRing::kSlot);
    put_part<Op::kSumsRows>(own, stats + team * kRows, warp_row, o[0], l[0], shift);
    if (lane == 0 && warp_row == 0) ptx::st_shared(places + team, static_cast<int>(own - reinterpret_cast<Acc*>(smem)));
    __syncthreads();  // every team's part
    cursor = get_shared(of_block);
    const RowTile merged(p, cursor, kRows);
    const PairParts<T, kRows, kValueDim, Acc> parts(merged, cursor, get_shared(shared_shares),
                                                    cursor.column * kValueDim, natural);
    merge_teams<kTeams, kThreads>(parts, stats, reinterpret_cast<Acc*>(smem), places, fold);
    parts.template merge<kThreads>(fold);
    cursor.next_segment(p);
    __syncthreads();  // Q, its rules, statistics and the slots of O are free
  }
}
