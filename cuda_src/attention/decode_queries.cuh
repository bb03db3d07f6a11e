// The rows of Q of one warp, for the scores of many tiles of keys.
#pragma once

#include <attention/matmul.cuh>

// Of every kEvery steps of 16 columns step `part`. kHeld: in registers, of 16 bits.
template <class Op, class QTile, int kDim, int kEvery, bool kHeld>
struct Queries {
  QTile tile;
  int row, part;
  __device__ __forceinline__ Queries(QTile tile, int row, int part = 0) : tile(tile), row(row), part(part) {}

  template <int kNTiles, class KTile>
  __device__ __forceinline__ void scores(typename Op::Acc (&s)[1][kNTiles][4], KTile k) const {
    Op::template scores<kDim, kEvery>(s, tile, row, k, part);
  }
};
template <class Op, class QTile, int kDim, int kEvery>
struct Queries<Op, QTile, kDim, kEvery, true> {
  static constexpr int kSteps = kDim / 16 / kEvery;
  static_assert(2 * kEvery % QTile::kRepeat == 0 || QTile::kRepeat % (2 * kEvery) == 0, "chunks differ by constants");
  unsigned int a[kSteps][4];
  int part;
  __device__ __forceinline__ Queries(QTile tile, int row, int part = 0) : part(part) {
    const typename QTile::Lane lane = tile.lane(row + lane_index() % 16, lane_index() / 16 + 2 * part);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ptx::ldmatrix_x4(a[step], lane.chunk(0, 2 * kEvery * step));
  }

  template <int kNTiles, class KTile>
  __device__ __forceinline__ void scores(float (&s)[1][kNTiles][4], KTile k) const {
    const typename KTile::Lane lane = k.lane(lane_index() % 8 + lane_index() / 16 * 8, lane_index() / 8 % 2 + 2 * part);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        unsigned int b[4];
        ptx::ldmatrix_x4(b, lane.chunk(8 * n, 2 * kEvery * step));
        Op::mma(s[0][n], a[step], b[0], b[1]);
        Op::mma(s[0][n + 1], a[step], b[2], b[3]);
      }
    }
  }
};
