// Merges the lists and states of the blocks that shared a row (topk/rows.cuh) into the row's result.
//
// One block of kWarps warps per row: warp w takes the lists of slices w, w + kWarps, ..., then the warps merge
// theirs. Grid: rows blocks. Shared memory: one list per warp.
#pragma once

#include <topk/sample.cuh>
#include <primitives/warp_list.cuh>
#include <ptx/smem.cuh>

template <class Op, int kWarps, int kPerLane>
__global__ void __launch_bounds__(32 * kWarps, 1) topk_merge(const __grid_constant__ typename Op::Params params) {
  using Candidate = typename Op::Candidate;
  using State = typename Op::State;
  Candidate* slots = ptx::static_smem<Candidate, kWarps * 32 * kPerLane>();
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const long long row = blockIdx.x, splits = params.row.splits;
  const Op op(params, row);
  if (!op.is_wanted()) return;

  WarpList<Candidate, kPerLane> list(slots, static_cast<int>(params.k));
  const Candidate* lists = static_cast<const Candidate*>(params.lists) + row * splits * params.k;
  for (long long i = warp; i < splits; i += kWarps) list.absorb_stored(lists + i * params.k);
  merge_lists<32 * kPerLane>(list, slots, kWarps);

  State total = State::identity();
  if constexpr (!kIsSame<State, NoState>) {
    // In the order in which topk_rows merges the parts of a row.
    const State* partial = static_cast<const State*>(params.row.partial) + row * params.row.parts;
    for (long long i = threadIdx.x % 32; warp == 0 && i < params.row.parts; i += 32) {
      total = total.merge(ptx::ld_global(partial + i), op.unit);
    }
    total = total.template merge_group<32>(op.unit);
  }
  if (warp == 0) store_selection(op, list.best, total);
}
