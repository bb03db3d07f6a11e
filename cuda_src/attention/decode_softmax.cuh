// The softmax of a decode tile: from the scores of one warp's 16 rows to P, in registers.
#pragma once

#include <attention/decode_load.cuh>
#include <primitives/warp.cuh>

// The rules of a warp's rows, and the keys that all of them see. Score: a score expression.
template <class Acc, class Score>
struct WarpRules {
  const RowRule<Acc>* rules;  // in shared memory
  int b;                      // sequence
  int all_low, all_high;

  __device__ __forceinline__ WarpRules(const RowRule<Acc>* rules, int b) : rules(rules), b(b) {
    const RowRule<Acc> of_lane = get_shared(rules + threadIdx.x % 16);
    all_low = __reduce_max_sync(0xffffffff, of_lane.low);
    all_high = __reduce_min_sync(0xffffffff, of_lane.high);
  }

  // Softcap, ALiBi, Score, masks: on a tile that begins at `key`. Returns which keys this lane's rows see, if a mask
  // says so.
  template <int kNTiles, class Bits>
  __device__ __forceinline__ Bits apply(const DecodeParams& p, Acc (&s)[1][kNTiles][4], int key, Bits exist) const {
    constexpr int kKeys = 8 * kNTiles;
    constexpr Bits kAll = static_cast<Bits>(~0ULL >> (64 - kKeys));
    Bits seen = 0;  // bit c is key c of the tile
    if (!p.rule && key >= all_low && key + kKeys <= all_high && (exist & kAll) == kAll) return seen;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowRule<Acc> rule = get_shared(rules + lane / 4 + 8 * half);
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int c = 8 * n + lane % 4 * 2 + e;
          const bool visible = (exist >> c & 1) != 0 && rule.sees(p, key + c);
          Acc& score = s[0][n][2 * half + e];
          seen |= static_cast<Bits>(visible && rule.low >= 0) << c;
          if (p.rule) score = rule.template score<Score>(p, score, b, key + c);
          score = visible ? score : -Limits<Acc>::infinity();
        }
      }
    }
    return seen;
  }
};

// m' = max(m, rowmax S), where that grew much;  O = O exp(m - m');  P = exp(S - m');  l likewise, but for products that
// sum rows up themselves.
template <bool kSumsRows, class Acc, int kNTiles, int kDTiles>
__device__ __forceinline__ void softmax_step(Acc (&s)[1][kNTiles][4], Acc (&o)[1][kDTiles][4], Acc (&l)[1][2],
                                             RowShift<Acc> (&shift)[2], Acc fold) {
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
#pragma unroll
  for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Acc& weight = s[0][n][e];
      weight = ScoreBase<Acc>::exp(::fma(weight, fold, -shift[e / 2].base));
      if constexpr (!kSumsRows) l[0][e / 2] += weight;
    }
  }
}
