// Rows of any length, shared by `splits` blocks: a first launch reduces, a second one reads again, normalises and
// writes. Reductions whose blocks have whole rows take one launch.
//
//   kReduce     (m, l) of each part of a row: m = max(t), l = sum(exp(t - m)), one rescale per tile
//   kNormalize  (m, l) of the row from those of its parts, then y = exp(t - m) / l
//   kFused      kReduce, and the merge of the parts of the row: its lse or state; splits is 1
//
// A row is summed up part by part, and the states of the parts are merged in one order (softmax/merge.cuh), whichever
// blocks have reduced them: how many blocks share a row changes no bit. Block b has `share` parts of row group b /
// splits, from part (b % splits) * share on; a block holds kRowsPerBlock rows (1 unless a row takes at most a warp, and
// then it is one part). Parts begin on fragment boundaries of x. Shared memory: two states per warp.
//
// Milakov & Gimelshein, arXiv:1805.02867, algorithm 3 (each thread) and section 3.1 (the merge).
#pragma once

#include <primitives/block.cuh>
#include <softmax/backward.cuh>
#include <softmax/logits.cuh>

// Blocks per SM: 512 threads leave 128 registers, ptxas would take 130 where it widens float32 to float64.
template <class Op, SoftmaxPass kPass, int kThreadsPerRow>
constexpr int kSplitBlocks =
    kPass != kNormalize && Op::kReduces && Op::kVec == 4 && kThreadsPerRow > 32 ? 512 / kThreadsPerRow : 1;

template <class Op, SoftmaxPass kPass, int kThreadsPerRow, int kRowsPerBlock, int kFragments>
__global__ void __launch_bounds__(kThreadsPerRow* kRowsPerBlock, kSplitBlocks<Op, kPass, kThreadsPerRow>)
    softmax_split(const __grid_constant__ typename Op::Params params) {
  constexpr int kGroup = kThreadsPerRow < 32 ? kThreadsPerRow : 32;
  constexpr int kWarpsPerRow = kThreadsPerRow / kGroup;
  constexpr int kStep = kThreadsPerRow * Op::kVec;
  static_assert(kThreadsPerRow * kRowsPerBlock % 32 == 0, "collectives need whole warps");
  static_assert(kRowsPerBlock == 1 || kWarpsPerRow == 1, "a block merges the warps of one row");
  using State = typename Op::State;
  using Part = typename Op::Part;

  // Row and parts of this thread. Threads past the last row own no column but take part in every collective.
  const int thread = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const unsigned splits = kWarpsPerRow == 1 ? 1 : static_cast<unsigned>(params.splits);
  const long long row = static_cast<long long>(blockIdx.x / splits) * kRowsPerBlock + threadIdx.x / kThreadsPerRow;
  const bool exists = row < params.rows;
  Op op(params, exists ? row : 0);
  const long long first_part = kWarpsPerRow == 1 ? 0 : blockIdx.x % splits * params.share;
  const long long end_part = kWarpsPerRow == 1 ? params.parts : min(first_part + params.share, params.parts);
  State* partial = static_cast<State*>(params.partial) + (exists ? row : 0) * params.parts;

  // Columns of the parts, from a fragment boundary on; a tile of kFragments loads per thread is in flight.
  constexpr int kTile = kStep * kFragments;
  const long long start = first_part * params.slice - op.past_boundary();
  const long long begin = max(start, 0LL);
  const long long last =
      kWarpsPerRow == 1 ? params.cols : min(start + (end_part - first_part) * params.slice, params.cols);
  const long long end = exists ? last : 0;
  const auto fragments_inside = [&](long long first_col) {
    const long long inside = (end - first_col + kStep - 1) / kStep;
    return inside < kFragments ? static_cast<int>(inside) : kFragments;
  };

  if constexpr (kPass != kNormalize) {
    State all = State::identity();  // of the parts that a lane of the first warp merges
    const int count = kWarpsPerRow == 1 ? 1 : static_cast<int>(end_part - first_part);
    // All warps take part in every part. Even one that no column is left for has a state.
    for (int done = 0; done < count; ++done) {
      const long long part_start = start + done * params.slice;
      const long long part_end = min(part_start + params.slice, end);
      Part part = Part::identity();
      for (long long tile = part_start; tile < part_end; tile += kTile) {
        const long long first_col = tile + thread * Op::kVec;
        typename Op::template Items<Op::kVec> items[kFragments];
        load_tile<false, kStep, Op::kVec, kFragments>(op, items, first_col, begin, end);
        part = part.extend(op.template accumulate<1>(items, fragments_inside(first_col), part), op.unit);
      }
      // What this thread's elements of the part add to its sum, without the part's maximum (RestState).
      const auto rest = [&](auto m) {
        auto sum = m - m;
#pragma unroll 1
        for (long long col = part_start + thread * Op::kVec; col < part_end; col += kStep) {
          typename Op::template Items<Op::kVec> items[1];
          load_tile<false, kStep, Op::kVec, 1>(op, items, col, begin, end);
          sum += op.template rest<false>(items, 1, m);
        }
        return sum;
      };
      State total = State::template of_group<kGroup, 1, false>(part, op.unit, rest);
      if constexpr (kWarpsPerRow == 1) {
        all = total;
      } else {
        total = block_merge<kWarpsPerRow, true>(total, op.unit, done);
        if constexpr (kPass == kReduce) {
          if (thread == 0) store_state(partial + (first_part + done), total);
        } else if (thread == done % 32) {  // the block has all parts
          all = all.merge(total, op.unit);
        }
      }
    }
    if constexpr (kPass == kReduce) return;
    if constexpr (kWarpsPerRow > 1) {
      if (threadIdx.x >= 32) return;
      all = all.template merge_group<kGroup>(op.unit);
    }
    if (thread == 0 && exists) op.store_stat(all, row);
  } else {
    State total = State::identity();
    for (long long i = thread; i < params.parts; i += kThreadsPerRow) {
      total = total.merge(load_state(partial + i), op.unit);
    }
    total = total.template merge_group<kGroup>(op.unit);
    if constexpr (kWarpsPerRow > 1) total = block_merge<kWarpsPerRow>(total, op.unit);
    op.finish(total, total);

    for (long long tile = start; tile < end; tile += kTile) {
      const long long first_col = tile + thread * Op::kVec;
      typename Op::template Items<Op::kVec> items[kFragments];
      load_tile<true, kStep, Op::kVec, kFragments>(op, items, first_col, begin, end);
      const int used = fragments_inside(first_col);
#pragma unroll
      for (int i = 0; i < kFragments; ++i) {
        if (i < used) op.prepare(items[i], total);
        op.template store<kThreadsPerRow % 32 == 0>(items[i], first_col + i * kStep, begin, end);
      }
    }
    if (thread == 0 && exists && first_part == 0) op.store_stat(total, row);
  }
}
