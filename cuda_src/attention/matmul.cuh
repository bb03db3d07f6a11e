// The two matrix products of attention on the rows of one warp, for tensor cores and without.
//
// Accumulators are the fragments of mma.m16n8: of each 16 x 8 tile, lane 4g + t has rows g, g, g + 8, g + 8 and columns
// 2t, 2t + 1, 2t, 2t + 1. S = Q K^T leaves the columns of P where the second product wants them as its A operand, so P
// never leaves the registers. A contraction may take its index in any order: where the A fragment wants columns t and
// t + 4 of a lane (tf32, float64), these slots are given keys 2t and 2t + 1.
//
//   Op::Element  in shared memory        Op::Acc  of S, P, O and the row sums
//   scores<D, E>(s, q, row, k, part)     s += rows `row`… of tile q times all rows of tile k, over D columns: of every
//                                        E steps of 16 (tf32: 8; float32: 4) columns, step `part`
//   values(o, l, p, v)                   o += p v; kSumsRows: l += p 1 in the same order: equal values stay exact
#pragma once

#include <attention/tile.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mma.cuh>

__device__ __forceinline__ unsigned int lane_index() { return threadIdx.x % 32; }

// S += Q K^T where both operands come by ldmatrix: 2 chunks of 16 bytes per step, whatever the element.
template <class Op, int kSteps, int kEvery, int kMTiles, int kNTiles, class QTile, class KTile>
__device__ __forceinline__ void ldmatrix_scores(float (&s)[kMTiles][kNTiles][4], QTile q, int row, KTile k, int part) {
  static_assert(2 * kEvery % QTile::kRepeat == 0 || QTile::kRepeat % (2 * kEvery) == 0, "chunks differ by constants");
  static_assert(kNTiles % 2 == 0, "an ldmatrix loads 16 keys");
  const unsigned int lane = lane_index();
  const typename QTile::Lane q_lane = q.lane(row + lane % 16, lane / 16 + 2 * part);
  const typename KTile::Lane k_lane = k.lane(lane % 8 + lane / 16 * 8, lane / 8 % 2 + 2 * part);
#pragma unroll(QTile::kPerChunk == 4 ? 4 : 2)  // with more, or tf32 with less, the widest tiles spill on sm_120
  for (int step = 0; step < kSteps; ++step) {
    unsigned int a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      ptx::ldmatrix_x4(a[m], q_lane.chunk(16 * m, 2 * kEvery * step));
      Op::round(a[m]);
    }
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      unsigned int b[4];
      ptx::ldmatrix_x4(b, k_lane.chunk(8 * n, 2 * kEvery * step));
      Op::round(b);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        Op::mma(s[m][n], a[m], b[0], b[1]);
        Op::mma(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// float16 and bfloat16: mma.m16n8k16.
template <class T>
struct HalfOp {
  using Element = T;
  using Acc = float;
  static constexpr bool kSumsRows = false;

  static __device__ __forceinline__ void round(unsigned int (&)[4]) {}
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0,
                                             unsigned int b1) {
    ptx::mma_m16n8k16<T>(d, a, b0, b1);
  }

  template <int kDim, int kEvery = 1, int kMTiles, int kNTiles, class QTile, class KTile>
  static __device__ __forceinline__ void scores(float (&s)[kMTiles][kNTiles][4], QTile q, int row, KTile k,
                                                int part = 0) {
    ldmatrix_scores<HalfOp, kDim / 16 / kEvery, kEvery>(s, q, row, k, part);
  }

  template <int kMTiles, int kNTiles, int kDTiles, class VTile>
  static __device__ __forceinline__ void values(float (&o)[kMTiles][kDTiles][4], float (&)[kMTiles][2],
                                                const float (&p)[kMTiles][kNTiles][4], VTile v) {
    const unsigned int lane = lane_index();
    const typename VTile::Lane v_lane = v.lane(lane % 16, lane / 16);
#pragma unroll
    for (int n = 0; n < kNTiles; n += 2) {
      unsigned int a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[m][i] = ptx::cvt_rn_x2<T>(p[m][n + i / 2][i % 2 * 2], p[m][n + i / 2][i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int d = 0; d < kDTiles; d += 2) {
        unsigned int b[4];
        ptx::ldmatrix_x4_trans(b, v_lane.chunk(8 * n, d));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          mma(o[m][d], a[m], b[0], b[1]);
          mma(o[m][d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// float32 rounded to tf32 (10 bits of mantissa): mma.m16n8k8.
struct Tf32Op {
  using Element = float;
  using Acc = float;
  static constexpr bool kSumsRows = true;

  // The tensor core would cut the low bits off.
  static __device__ __forceinline__ void round(unsigned int (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ptx::cvt_rna_tf32(__uint_as_float(a[i]));
  }
  static __device__ __forceinline__ void mma(float (&d)[4], const unsigned int (&a)[4], unsigned int b0,
                                             unsigned int b1) {
    ptx::mma_m16n8k8_tf32(d, a, b0, b1);
  }

  template <int kDim, int kEvery = 1, int kMTiles, int kNTiles, class QTile, class KTile>
  static __device__ __forceinline__ void scores(float (&s)[kMTiles][kNTiles][4], QTile q, int row, KTile k,
                                                int part = 0) {
    ldmatrix_scores<Tf32Op, kDim / 8 / kEvery, kEvery>(s, q, row, k, part);
  }

  template <int kMTiles, int kNTiles, int kDTiles, class VTile>
  static __device__ __forceinline__ void values(float (&o)[kMTiles][kDTiles][4], float (&l)[kMTiles][2],
                                                const float (&p)[kMTiles][kNTiles][4], VTile v) {
    const unsigned int g = lane_index() / 4, t = lane_index() % 4;
    const unsigned int one = __float_as_uint(1.0f);
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      unsigned int a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        a[m][0] = __float_as_uint(p[m][n][0]);
        a[m][1] = __float_as_uint(p[m][n][2]);
        a[m][2] = __float_as_uint(p[m][n][1]);
        a[m][3] = __float_as_uint(p[m][n][3]);
        round(a[m]);
        float sums[4] = {l[m][0], l[m][0], l[m][1], l[m][1]};
        mma(sums, a[m], one, one);
        l[m][0] = sums[0];
        l[m][1] = sums[2];
      }
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
        const unsigned int b0 = ptx::cvt_rna_tf32(ptx::ld_shared(v.at(8 * n + 2 * t, 8 * d + g)));
        const unsigned int b1 = ptx::cvt_rna_tf32(ptx::ld_shared(v.at(8 * n + 2 * t + 1, 8 * d + g)));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) mma(o[m][d], a[m], b0, b1);
      }
    }
  }
};

// float64: mma.m8n8k4, twice for 16 rows.
struct DoubleOp {
  using Element = double;
  using Acc = double;
  static constexpr bool kSumsRows = true;

  static __device__ __forceinline__ void mma(double (&d)[4], double low, double high, double b) {
    double rows[2][2] = {{d[0], d[1]}, {d[2], d[3]}};
    ptx::mma_m8n8k4_f64(rows[0], low, b);
    ptx::mma_m8n8k4_f64(rows[1], high, b);
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = rows[i / 2][i % 2];
  }

  // Slot t of step i is half t % 2 of chunk i + 4 (t / 2) of 8: four rows of 4 such halves never share a bank.
  template <int kDim, int kEvery = 1, int kMTiles, int kNTiles, class QTile, class KTile>
  static __device__ __forceinline__ void scores(double (&s)[kMTiles][kNTiles][4], QTile q, int row, KTile k,
                                                int part = 0) {
    const unsigned int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int first = 16 * part; first < kDim; first += 16 * kEvery) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const unsigned int col = first + 2 * step + t % 2 + t / 2 * 8;
        double low[kMTiles], high[kMTiles];
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          low[m] = ptx::ld_shared(q.at(row + 16 * m + g, col));
          high[m] = ptx::ld_shared(q.at(row + 16 * m + g + 8, col));
        }
#pragma unroll
        for (int n = 0; n < kNTiles; ++n) {
          const double b = ptx::ld_shared(k.at(8 * n + g, col));
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) mma(s[m][n], low[m], high[m], b);
        }
      }
    }
  }

  template <int kMTiles, int kNTiles, int kDTiles, class VTile>
  static __device__ __forceinline__ void values(double (&o)[kMTiles][kDTiles][4], double (&l)[kMTiles][2],
                                                const double (&p)[kMTiles][kNTiles][4], VTile v) {
    const unsigned int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          double sums[4] = {l[m][0], l[m][0], l[m][1], l[m][1]};
          mma(sums, p[m][n][odd], p[m][n][2 + odd], 1.0);
          l[m][0] = sums[0];
          l[m][1] = sums[2];
        }
#pragma unroll
        for (int d = 0; d < kDTiles; ++d) {
          const double b = ptx::ld_shared(v.at(8 * n + 2 * t + odd, 8 * d + g));
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) mma(o[m][d], p[m][n][odd], p[m][n][2 + odd], b);
        }
      }
    }
  }
};

// float32, one multiply-add at a time in the order of the contraction: as accurate as a plain matrix product. Lanes of
// equal g, or of equal t, read equal addresses, so that a wavefront of shared memory feeds 4 multiply-adds or more.
struct FloatOp {
  using Element = float;
  using Acc = float;
  static constexpr bool kSumsRows = true;

  // The columns of a tile are summed up by themselves first, so that errors grow less where heads are wider.
  template <int kDim, int kEvery = 1, int kMTiles, int kNTiles, class QTile, class KTile>
  static __device__ __forceinline__ void scores(float (&s)[kMTiles][kNTiles][4], QTile q, int row, KTile k,
                                                int part = 0) {
    using Chunk = typename QTile::Chunk;
    const unsigned int g = lane_index() / 4, t = lane_index() % 4;
    float sum[kMTiles][kNTiles][4] = {};
#pragma unroll 2
    for (int column = part; column < QTile::kChunks; column += kEvery) {
      Chunk rows[kMTiles][2];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rows[m][i] = ptx::ld_shared(reinterpret_cast<const Chunk*>(q.chunk(row + 16 * m + g + 8 * i, column)));
        }
      }
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Chunk key = ptx::ld_shared(reinterpret_cast<const Chunk*>(k.chunk(8 * n + 2 * t + j, column)));
#pragma unroll
          for (int e = 0; e < QTile::kPerChunk; ++e) {
            const float b = key.element[e];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
              sum[m][n][j] = fmaf(rows[m][0].element[e], b, sum[m][n][j]);
              sum[m][n][2 + j] = fmaf(rows[m][1].element[e], b, sum[m][n][2 + j]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] += sum[m][n][i];
      }
    }
  }

  // A tile of keys is summed up by itself first, so that rounding errors grow with the square root of the tiles.
  template <int kMTiles, int kNTiles, int kDTiles, class VTile>
  static __device__ __forceinline__ void values(float (&o)[kMTiles][kDTiles][4], float (&l)[kMTiles][2],
                                                const float (&p)[kMTiles][kNTiles][4], VTile v) {
    using Pair = Fragment<float, 2>;
    constexpr int kTogether = 8 / kMTiles;  // tiles of columns whose sums are in registers twice
    const unsigned int t = lane_index() % 4;
#pragma unroll
    for (int first = 0; first < kDTiles; first += kTogether) {
      float part[kMTiles][kTogether][4] = {}, weights[kMTiles][2] = {};
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
#pragma unroll 1
          for (int owner = 0; owner < 4; ++owner) {  // the lane of the quad that has key 8n + 2 owner + odd
            float weight[kMTiles][2];
#pragma unroll
            for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                weight[m][i] = __shfl_sync(0xffffffff, p[m][n][2 * i + odd], owner, 4);
                weights[m][i] += weight[m][i];
              }
            }
#pragma unroll
            for (int d = 0; d < kTogether; ++d) {
              if (first + d >= kDTiles) break;
              const unsigned int col = 8 * (first + d) + 2 * t;
              const Pair pair = ptx::ld_shared(reinterpret_cast<const Pair*>(v.at(8 * n + 2 * owner + odd, col)));
#pragma unroll
              for (int j = 0; j < 2; ++j) {
                const float b = pair.element[j];
#pragma unroll
                for (int m = 0; m < kMTiles; ++m) {
                  part[m][d][j] = fmaf(weight[m][0], b, part[m][d][j]);
                  part[m][d][2 + j] = fmaf(weight[m][1], b, part[m][d][2 + j]);
                }
              }
            }
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int d = 0; d < kTogether; ++d) {
          if (first + d >= kDTiles) break;
#pragma unroll
          for (int i = 0; i < 4; ++i) o[m][first + d][i] += part[m][d][i];
        }
        if (first == 0) {
          l[m][0] += weights[m][0];
          l[m][1] += weights[m][1];
        }
      }
    }
  }
};
