// Merges what the blocks that shared a row have found (attention/topk.cuh) into the row's result.
//
// One block of kWarps warps per row: warp w takes the lists of blocks w, w + kWarps, …, then the warps merge theirs;
// the first one adds up the sums of all parts, in the order of a block that has the row alone. Grid: one block per row.
#pragma once

#include <attention/topk_rows.cuh>
#include <ptx/smem.cuh>

template <class T, class Acc, int kWarps, int kPerLane>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_topk_merge(const __grid_constant__ AttentionTopKParams params) {
  using Candidate = typename ScoreCandidate<Acc>::Type;
  using State = SoftmaxState<Acc>;
  Candidate* slots = ptx::static_smem<Candidate, kWarps * 32 * kPerLane>();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const long long row = blockIdx.x;

  WarpList<Candidate, kPerLane> list(slots, params.count);
  const Candidate* lists = static_cast<const Candidate*>(params.lists) + row * params.splits * params.count;
  for (int i = warp; i < params.splits; i += kWarps) {
    list.absorb_stored(lists + static_cast<long long>(i) * params.count);
  }
  merge_lists<32 * kPerLane>(list, slots, kWarps);
  if (warp != 0) return;

  const State* states = static_cast<const State*>(params.states) + row * params.parts;
  State total = State::identity();
#pragma unroll 4
  for (int i = lane; i < params.parts; i += AttentionTopKParams::kSums) {
    if (lane < AttentionTopKParams::kSums) total = total.merge(ptx::ld_global(states + i), Acc(1));
  }
  total = total.template merge_group<AttentionTopKParams::kSums>(Acc(1));
  total = {__shfl_sync(0xffffffff, total.m, 0), __shfl_sync(0xffffffff, total.l, 0)};
  store_best<T>(params, row, list.best, total);
}
