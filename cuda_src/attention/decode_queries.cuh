// The rows of Q of one warp, for the scores of many tiles of keys.
#pragma once

#include <attention/matmul.cuh>

// Of 16 bits and up to 128 columns in registers.
template <class Op, class QTile, int kDim, bool kHeld = sizeof(typename Op::Element) == 2 && kDim <= 128>
struct Queries {
  QTile tile;
  int row;
  __device__ __forceinline__ Queries(QTile tile, int row) : tile(tile), row(row) {}

  template <int kNTiles, class KTile>
  __device__ __forceinline__ void scores(typename Op::Acc (&s)[1][kNTiles][4], KTile k) const {
    Op::template scores<kDim>(s, tile, row, k);
  }
};
template <class Op, class QTile, int kDim>
struct Queries<Op, QTile, kDim, true> {
  unsigned int a[kDim / 16][4];
  __device__ __forceinline__ Queries(QTile tile, int row) {
    const typename QTile::Lane lane = tile.lane(row + lane_index() % 16, lane_index() / 16);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) ptx::ldmatrix_x4(a[step], lane.chunk(0, 2 * step));
  }

  template <int kNTiles, class KTile>
  __device__ __forceinline__ void scores(float (&s)[1][kNTiles][4], KTile k) const {
    const typename KTile::Lane lane = k.lane(lane_index() % 8 + lane_index() / 16 * 8, lane_index() / 8 % 2);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kNTiles; n += 2) {
        unsigned int b[4];
        ptx::ldmatrix_x4(b, lane.chunk(8 * n, 2 * step));
        Op::mma(s[0][n], a[step], b[0], b[1]);
        Op::mma(s[0][n + 1], a[step], b[2], b[3]);
      }
    }
  }
};
