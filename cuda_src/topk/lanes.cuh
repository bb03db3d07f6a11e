// The k best elements of each row, k <= kList <= 8, and in SoftmaxTopK its softmax state, by one group of lanes per
// row: the scores of a router, or columns (the reduced axis is not the last one). One read.
//
//   each lane, tile by tile:  m, l <- the tile's maximum, one exponential per element         (SoftmaxTopK)
//                             tile maximum above the last of the list:
//                               sort the tile's elements by kList and merge them into the list
//   the group:                merge lists and states; the lanes share the list, and store what they hold of it
//
// kGroup lanes, kStride lanes apart, share a row: 32 / kGroup rows per warp.
//   kStride = 1            neighbouring lanes along a contiguous row, kVec elements at a time from fragment boundaries
//                          (vector.cuh), or one by one (kVec = 1) at any stride
//   kStride = 32 / kGroup  neighbouring lanes in neighbouring rows, which are neighbours in memory
// Grid: ceil(rows / rows per block) blocks. No shared memory.
#pragma once

#include <topk/lane_list.cuh>
#include <topk/ops.cuh>

// Whether the row has this column: one comparison for both ends.
__device__ __forceinline__ bool inside(int col, int cols) {
  return static_cast<unsigned int>(col) < static_cast<unsigned int>(cols);
}
__device__ __forceinline__ bool inside(long long col, long long cols) {
  return static_cast<unsigned long long>(col) < static_cast<unsigned long long>(cols);
}

// What a lane holds of one tile of its row: kFragments of kVec elements, kStep columns apart.
template <class Op, int kStep, int kVec, int kFragments>
struct LaneTile {
  using Candidate = typename Op::Candidate;
  using Index = typename Select<(kVec > 1), int, long long>::Type;

  const Op& op;
  Index first_col;
  Index cols;
  bool whole;  // all columns are inside the row
  typename Op::template Items<kVec> items[kFragments];

  // All loads are in flight before the first is waited for.
  __device__ __forceinline__ LaneTile(const Op& op, Index first_col, Index cols)
      : op(op), first_col(first_col), cols(cols) {
    typename Op::template Loaded<kVec> loaded[kFragments];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) op.template load<true>(loaded[i], first_col + i * kStep, Index(0), cols);
    whole = first_col >= 0 && first_col + (kFragments - 1) * kStep + kVec <= cols;
    if (whole) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) op.unpack(items[i], loaded[i], 0, 0, kVec);  // known to be inside
    } else {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) op.unpack(items[i], loaded[i], first_col + i * kStep, Index(0), cols);
    }
  }

  // State of its elements, relative to a maximum of at least floor.m.
  __device__ __forceinline__ typename Op::State accumulate(typename Op::State floor) {
    const Index begun = (cols - first_col + kStep - 1) / kStep;  // fragments that begin inside the row
    const int used = begun < 0 ? 0 : begun < kFragments ? static_cast<int>(begun) : kFragments;
    return op.template accumulate<1>(items, used, floor);
  }

  // A candidate that no element beats.
  __device__ __forceinline__ Candidate head() const { return Candidate::make(op.best(items), first_col); }

  // Its best kList elements, descending; Candidate::none() stands for an element outside the row.
  template <int kList>
  __device__ __forceinline__ void select(Candidate (&best)[kList]) const {
#pragma unroll
    for (int first = 0; first < kFragments * kVec; first += kList) {
      Candidate c[kList];
#pragma unroll
      for (int i = 0; i < kList; ++i) {
        c[i] = op.candidate(items[(first + i) / kVec], (first + i) % kVec, col(first + i));
      }
      if (!whole) {
#pragma unroll
        for (int i = 0; i < kList; ++i) c[i].replace(!inside(col(first + i), cols), Candidate::none());
      }
      sort_descending(c);
      if (first == 0) {
#pragma unroll
        for (int i = 0; i < kList; ++i) best[i] = c[i];
      } else {
        absorb_list(best, c);
      }
    }
  }

 private:
  __device__ __forceinline__ Index col(int element) const {
    return first_col + element / kVec * kStep + element % kVec;
  }
};

template <class Op, int kList, int kGroup, int kStride, int kVec, int kFragments, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) topk_lanes(const __grid_constant__ typename Op::Params params) {
  constexpr int kStep = kGroup * kVec;
  constexpr int kTile = kStep * kFragments;
  static_assert(kThreads % 32 == 0, "collectives need whole warps");
  static_assert(kStride == 1 || kGroup * kStride == 32, "a group lies along a row, or groups lie beside each other");
  static_assert(kVec * kFragments % kList == 0, "a tile is sorted list by list");
  using Candidate = typename Op::Candidate;
  using State = typename Op::State;
  using Tile = LaneTile<Op, kStep, kVec, kFragments>;
  using Index = typename Tile::Index;

  // Row and place of this lane. Lanes past the last row own no column but take part in every collective.
  const unsigned lane = threadIdx.x % 32;
  const int place = lane / kStride % kGroup;
  const long long warp = static_cast<long long>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const long long row = warp * (32 / kGroup) + (kStride > 1 ? lane % kStride : lane / kGroup);
  const bool exists = row < params.row.rows;
  const Op op(params, exists ? row : 0);
  const Index cols = exists ? static_cast<Index>(params.row.cols) : 0;
  const Index first_col = place * kVec - (kVec > 1 ? op.past_boundary() : 0);

  // The first tile, the only one of a short row.
  Candidate best[kList];
  Tile first(op, first_col, cols);
  State total = first.accumulate(State::identity());
  first.select(best);

  // The other tiles: equally many for every row of the warp, whatever its alignment.
  const Index most = static_cast<Index>(params.row.cols) + kVec - 1;
  for (Index start = kTile; start < most; start += kTile) {
    Tile tile(op, first_col + start, cols);
    total = total.extend(tile.accumulate(total), op.unit);
    if (tile.first_col < cols && tile.head().beats(best[kList - 1])) {
      Candidate other[kList];
      tile.select(other);
      absorb_list(best, other);
    }
  }

  // Merge over the group, and store.
  total = total.template merge_group<kGroup, kStride>(op.unit);
  merge_group_lists<kGroup, kStride>(best, place);
  constexpr int kHeld = kListHeld<kList, kGroup>;
  const int held = place < kListHolders<kList, kGroup> ? first_held<kList, kGroup>(place) : kList;  // from here on
  State norm = total;
  if (params.renormalize) {
    norm = State::identity();
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held + i < params.k) norm = norm.merge(op.selected(best[i]), op.unit);
    }
    norm = norm.template merge_group<kGroup, kStride>(op.unit);
  }
  if (!exists) return;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (held + i < params.k) op.store(held + i, best[i], norm);
  }
  if (place == 0) op.store_row(total);
}
