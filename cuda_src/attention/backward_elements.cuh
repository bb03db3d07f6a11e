// Gradients of the elements of an array that a score expression looks into, of the sums by distance that
// attention/backward_score.cuh leaves:
//
//   for each distance of each head: element[place] += the sum, and those of heads that look up the same
//
// A block has a range of elements, and looks at the places of all sums. Each warp adds up some of the sums in their
// order, lanes that have one place together; then the warps' totals are added. So nothing but the sizes decides on the
// order.
#pragma once

#include <attention/distances.cuh>
#include <attention/expression.cuh>

template <class Acc, class Element, int kWarps, class Score>
__global__ void __launch_bounds__(32 * kWarps, 1)
    attention_backward_elements(const __grid_constant__ AttentionBackwardScoreParams params) {
  const AttentionParams& a = params.backward.attention;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(lane_index());
  const long long first = blockIdx.x * params.range;
  Acc* totals = ptx::dynamic_smem<Acc>();  // [kWarps][range]
  Acc* own = totals + warp * params.range;
  for (int i = lane; i < params.range; i += 32) ptx::st_shared(own + i, Acc(0));  // lane i % 32 has element i

  const Acc* sums = static_cast<const Acc*>(params.sums);
  const int rows = 1 << params.log2, shift = params.by_distance ? params.log2 : 0;
  // The sum of a distance, of a head or of all of its slot.
  const auto sum_of = [&](long long slot, int distance) {
    if (!params.by_distance) return ptx::ld_global(sums + slot);
    const Acc* at = sums + slot * 2 * rows + distance;
    // The next diagonal has it, too, but for distance 0: the last sum of a slot is 0.
    return ptx::ld_global(at + rows - 1) + ptx::ld_global(at + 2 * rows - 1);
  };
  const long long count = static_cast<long long>(params.units) * params.slots << shift;
  for (long long base = 32 * warp; base < count; base += 32 * kWarps) {
    int place = -1;
    Acc sum = 0;
    if (base + lane < count) {
      const unsigned int index = static_cast<unsigned int>((base + lane) >> shift), slots = params.slots;
      const unsigned int slot = index / slots * params.unit_step * slots + index % slots;
      const int distance = static_cast<int>(base + lane) & ((1 << shift) - 1);
      Diagonal found;
      const bool there = find_diagonal(a, params.slots, params.log2, slot, found);
      const long long far = (static_cast<long long>(found.number) << params.log2) + distance;
      if (there && (!params.by_distance || far < found.distances)) {
        const long long element =
            Score::template place<Acc>(found.block.batch, found.block.head, found.least + far, 0, a.score_arrays);
        if (element >= first && element < first + params.range) {
          place = static_cast<int>(element - first);
          for (int i = 0; i < params.shared; ++i) sum += sum_of(slot + i * params.shared_step, distance);
        }
      }
    }
    for (unsigned int left = __ballot_sync(0xffffffff, place >= 0); left != 0;) {
      const int next = __shfl_sync(0xffffffff, place, __ffs(left) - 1);
      const Acc total = group_sum<32>(place == next ? sum : Acc(0));
      if (lane == next % 32) ptx::st_shared(own + next, ptx::ld_shared(own + next) + total);
      left &= ~__ballot_sync(0xffffffff, place == next);
    }
  }
  __syncthreads();  // the totals of all warps
  const long long end = min(params.range, params.count - first);
  for (int i = static_cast<int>(threadIdx.x); i < end; i += 32 * kWarps) {
    Acc total = params.before == nullptr ? Acc(0) : ptx::ld_global(static_cast<const Acc*>(params.before) + first + i);
    for (int w = 0; w < kWarps; ++w) total += ptx::ld_shared(totals + w * params.range + i);
    ptx::st_global(static_cast<Element*>(params.elements) + first + i, from_acc<Element>(total));
  }
}
