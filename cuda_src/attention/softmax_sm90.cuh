// Parts of attention/forward_sm90.cuh: from the scores of a tile to P, in the registers of the consumers.
//
// Accumulators are the fragments of wgmma (ptx/wgmma.cuh): a lane has two rows of its warpgroup's 64, 8 apart, and in
// each of them the two columns from lane % 4 * 2 on of every 8.
#pragma once

#include <attention/scores.cuh>
#include <primitives/warp.cuh>

// Register r of a lane's accumulators: in which of its two rows, and in which column behind its first, it lies.
__device__ __forceinline__ constexpr int row_half(int r) { return r / 2 % 2; }
__device__ __forceinline__ constexpr int column_of(int r) { return 8 * (r / 4) + r % 2; }

// The two rows of a lane: query and head, the keys low … high - 1 that the query sees, and the ALiBi slope.
struct LaneRows {
  int query[2], head[2], low[2], high[2];
  float slope[2] = {};

  // Row `row0` of the block and the one 8 further down; the block's rows are queries of 2^pack_log2 heads.
  template <bool kModified>
  static __device__ __forceinline__ LaneRows of(const AttentionParams& params, const QueryBlock& block, int pack_log2,
                                                int row0) {
    LaneRows rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + 8 * half;
      rows.query[half] = block.first + (row >> pack_log2);
      rows.head[half] = (block.head << pack_log2) + (row & ((1 << pack_log2) - 1));
      rows.low[half] = block.low(rows.query[half]);
      rows.high[half] = block.high(rows.query[half]);
    }
    if (kModified && params.alibi_slopes != nullptr) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rows.slope[half] =
            ptx::ld_global(static_cast<const float*>(params.alibi_slopes) + block.batch * params.alibi_stride[0] +
                           rows.head[half] * params.alibi_stride[1]);
      }
    }
    return rows;
  }
};

// tanh x with a relative error of at most 8 units of 2^-24, for small x too: up to 8.66, from where on tanh x rounds
// to 1, tanh(x) / x is a quotient of polynomials of t = x^2 within 2^-26 (iterated least squares); both are 1 at 0.
__device__ __forceinline__ float tanh_rational(float x) {
  constexpr float kMost = 8.66f;
  x = fabsf(x) > kMost ? copysignf(kMost, x) : x;  // NaN stays
  constexpr float kP[] = {1.4035713e-8f, 2.10948874e-5f, 3.52497911e-3f, 0.134057581f, 1.0f};
  constexpr float kQ[] = {8.05339482e-7f, 3.33377247e-4f, 2.59887353e-2f, 0.467390835f, 1.0f};
  const float t = x * x;
  float p = kP[0], q = kQ[0];
#pragma unroll
  for (int i = 1; i < 5; ++i) {
    p = ::fma(p, t, kP[i]);
    q = ::fma(q, t, kQ[i]);
  }
  return x * p * ptx::rcp_approx(q);
}

// Scale, softcap and ALiBi of a tile, with kModified. key: the tile's first key; column0: the lane's first column in
// it.
template <int kScores>
__device__ __forceinline__ void modify_scores(float (&s)[kScores], const AttentionParams& params,
                                              const QueryBlock& block, const LaneRows& rows, float scale, float softcap,
                                              int key, int column0) {
  if (softcap != 0) {
    const float most = Limits<float>::most(), approx = ptx::rcp_approx(softcap);
    const float inverse = ::fma(approx, ::fma(-softcap, approx, 1.0f), approx);  // no call, unlike a division
    const float inner = min(max(inverse * scale, -most), most);
#pragma unroll
    for (int r = 0; r < kScores; ++r) s[r] = softcap * tanh_rational(s[r] * inner);
  } else {
#pragma unroll
    for (int r = 0; r < kScores; ++r) s[r] *= scale;
  }
  if (params.alibi_slopes != nullptr) {
    const long long offset = block.to - params.right - 1 - key - column0;
    const float distance[2] = {static_cast<float>(rows.query[0] + offset), static_cast<float>(rows.query[1] + offset)};
#pragma unroll
    for (int r = 0; r < kScores; ++r) {
      s[r] -= rows.slope[row_half(r)] * fabsf(distance[row_half(r)] - column_of(r));
    }
  }
}

// The score expression of a tile. No row sees the keys from `end` on: they stay as they are. Asking that 8 keys at a
// time bounds the loads that are under way together, whose addresses would spill.
template <class Score, int kScores>
__device__ __forceinline__ void apply_score(float (&s)[kScores], const AttentionParams& params, const QueryBlock& block,
                                            const LaneRows& rows, int key, int column0, int end) {
  const long long offset = block.to - params.right - 1, first = key + column0;
  const long long place[2] = {rows.query[0] + offset, rows.query[1] + offset};  // of the queries among the keys
#pragma unroll
  for (int part = 0; part < kScores; part += 4) {
    if (key + 2 * part >= end) return;
#pragma unroll
    for (int r = part; r < part + 4; ++r) {
      const int half = row_half(r);
      s[r] = Score::template score<float>(s[r], block.batch, rows.head[half], place[half], first + column_of(r),
                                          params.score_arrays);
    }
  }
}

// Masks of a tile: the keys before rows.low, those from rows.high on.
template <int kScores>
__device__ __forceinline__ void mask_low(float (&s)[kScores], const LaneRows& rows, int key, int column0) {
#pragma unroll
  for (int r = 0; r < kScores; ++r) {
    if (column_of(r) < rows.low[row_half(r)] - key - column0) s[r] = -Limits<float>::infinity();
  }
}
template <int kScores>
__device__ __forceinline__ void mask_high(float (&s)[kScores], const LaneRows& rows, int key, int column0) {
#pragma unroll
  for (int r = 0; r < kScores; ++r) {
    if (column_of(r) >= rows.high[row_half(r)] - key - column0) s[r] = -Limits<float>::infinity();
  }
}

// Which keys of a tile the lane's two rows see, with a block mask: bit 2 i + e of a row is the lane's column 8 i + e.
template <int kKeys>
struct VisibleKeys {
  static_assert(kKeys <= 128, "a lane has up to 32 columns");
  unsigned int row[2] = {};

  // partial: the mask has a say, too, in what the rows see for their place.
  // kTogether: columns whose loads are under way together, as far as there are registers.
  template <int kTogether, class Tiles, class Rule>
  __device__ __forceinline__ void find(const Tiles& tiles, const Rule& rule, const LaneRows& rows, bool partial,
                                       int first) {
    row[0] = row[1] = 0;
#pragma unroll kTogether
    for (int n = 0; n < kKeys / 4; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = rows.query[half], key = first + 8 * (n / 2) + n % 2;
        const bool visible = query < rule.block.q_len && key >= rows.low[half] && key < rows.high[half];
        row[half] |= static_cast<unsigned int>(visible && (!partial || tiles.allowed(rule, query, key))) << n;
      }
    }
  }

  template <int kScores>
  __device__ __forceinline__ void hide(float (&s)[kScores]) const {
#pragma unroll
    for (int r = 0; r < kScores; ++r) {
      if ((row[row_half(r)] >> (2 * (r / 4) + r % 2) & 1) == 0) s[r] = -Limits<float>::infinity();
    }
  }

  // Keys that a row of the warp sees; in lane i, of the columns of lane i % 4.
  __device__ __forceinline__ unsigned int of_warp() const {
    unsigned int any = row[0] | row[1];
#pragma unroll
    for (int delta = 4; delta < 32; delta *= 2) any |= __shfl_xor_sync(0xffffffff, any, delta);
    return any;
  }
};

// The softmax of the lane's two rows over the tiles so far.
struct OnlineSoftmax {
  float l[2] = {};  // of this lane's columns
  RowShift<float> shift[2];
  float rescale[2];  // exp(m - m'), where the last step returned true

  // P' from S of the next tile. Returns whether m grew much, so that O is to be rescaled.
  template <int kScores>
  __device__ __forceinline__ bool step(float (&s)[kScores], float fold) {
    // m' = max(m, rowmax S), where that grew much.
    float part[4] = {s[0], s[1], s[2], s[3]};  // two per row: shorter chains of instructions
#pragma unroll
    for (int r = 4; r < kScores; ++r) part[r % 4] = max_number(part[r % 4], s[r]);
    float best[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      best[half] = group_max<4>(max_number(part[2 * half], part[2 * half + 1]));
    }
    const bool grew = __any_sync(0xffffffff, shift[0].exceeded(best[0]) || shift[1].exceeded(best[1]));
    if (grew) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        rescale[half] = shift[half].move(best[half], fold);
        l[half] *= rescale[half];
      }
#pragma unroll
      for (int r = 0; r < kScores; ++r) s[r] -= shift[row_half(r)].center;
    }
    // P' = exp(S - m'), l += rowsum P'
#pragma unroll
    for (int r = 0; r < kScores; ++r) {
      s[r] = ScoreBase<float>::exp(::fma(s[r], fold, -shift[row_half(r)].base));
      l[row_half(r)] += s[r];
    }
    return grew;
  }
};
