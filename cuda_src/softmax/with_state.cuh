// Parts of rows whose states are known: the second half of a softmax whose rows never meet.
//
//   y = exp(t - m) / l, or its logarithm t - m - log(l)        t = scale * x, (m, l) of the whole row
//   dx = scale * grad * (exp(t - lse) - [column is label])     the gradient of a loss (softmax/logits.cuh)
//
// Every element by itself: one read, one write. A block has kRows rows, kThreads / kRows threads each, and of them one
// of `splits` tiles of columns, kFragments fragments of kCount elements per thread. With kCount > 1 rows are contiguous
// and lie behind each other along threadIdx.x; with kCount = 1 they lie beside each other, at any strides.
// Grid: ceil(rows / kRows) * splits blocks, the tiles of a group of rows one after the other. No shared memory.
//
// Milakov & Gimelshein, arXiv:1805.02867, algorithm 3, lines 7-9.
#pragma once

#include <softmax/logits.cuh>

template <class Op, class Stat, int kThreads, int kRows, int kCount, int kFragments>
__global__ void __launch_bounds__(kThreads, 1) softmax_with_state(const __grid_constant__ typename Op::Params params) {
  constexpr int kPlaces = kThreads / kRows;  // threads of a row
  constexpr int kStep = kPlaces * kCount;    // columns from one fragment of a thread to the next
  constexpr bool kContiguous = kCount > 1;

  // Row and columns of this thread. Threads past the last row own no column.
  const unsigned splits = static_cast<unsigned>(params.splits);
  const int thread = static_cast<int>(threadIdx.x), place = kContiguous ? thread % kPlaces : thread / kRows;
  const long long row =
      static_cast<long long>(blockIdx.x / splits) * kRows + (kContiguous ? thread / kPlaces : thread % kRows);
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);
  const long long end = exists ? params.cols : 0;
  const long long first_col = static_cast<long long>(blockIdx.x % splits) * (kStep * kFragments) + place * kCount -
                              (kContiguous ? op.past_boundary() : 0);

  // Load the tile, all of it before the first use, and the state.
  const auto state = op.template load_given<Stat>(exists ? row : 0);
  typename Op::template Items<kCount> items[kFragments];
  load_tile<true, kStep, kCount, kFragments>(op, items, first_col, 0LL, op.skipped ? 0 : end);

  // Scale and store.
  op.finish(state, state);
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    if (first_col + i * kStep < end) op.prepare(items[i], state);
    op.template store<kContiguous && kPlaces % 32 == 0>(items[i], first_col + i * kStep, 0LL, end);
  }
  if (exists && place == 0 && blockIdx.x % splits == 0) op.store_stat(state, row);
}
