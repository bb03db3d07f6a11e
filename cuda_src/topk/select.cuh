// Adds to the row's list the wanted elements of the bin that holds the last of them (topk/radix.cuh).
//
// One block per row. Eleven bits at a time: a histogram of the candidates that agree in all bits before, then the bin
// of the last wanted one, until every candidate of that bin is wanted. One more walk copies the wanted ones. Candidates
// stay where they are: after the second histogram mostly a handful is left, and 64 bits take at most six walks.
//
// Shared memory: a histogram (kBins + kBinGroups counts) and four words.
#pragma once

#include <topk/radix.cuh>

template <class Op, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    topk_select(const __grid_constant__ RadixParams<typename Op::Params> params) {
  using Candidate = typename Op::Candidate;
  using Count = typename RadixOrder<Op>::Count;
  const int lane = threadIdx.x % 32;
  const long long row = blockIdx.x, cols = params.topk.row.cols;

  // What topk_filter has left.
  const Count* histogram = params.template at<Count>(0, row * (kBins + kBinGroups));
  Count wanted = static_cast<Count>(params.wanted);
  RadixBin<Count> last = block_find_bin([&](int i) { return ptx::ld_global(histogram + i); }, wanted);
  wanted -= last.before;
  if (last.inside == wanted) return;
  const Candidate* buffer = params.template at<Candidate>(params.buffer, row * cols);
  const Count count = last.inside;
  unsigned long long* next = ptx::static_smem<unsigned long long, 1>();  // free place of the list
  if (threadIdx.x == 0) ptx::st_shared(next, static_cast<unsigned long long>(last.before));

  Count* bins = ptx::static_smem<Count, kBins + kBinGroups>();
  RadixCut<Op> cut(last.bin, cols);
  do {
    clear_bins<kThreads>(bins);
    BinCounter<Count> counter{bins};
    walk_candidates<kThreads>(buffer, count, [&](Candidate candidate) {
      if (!candidate.is_none() && cut.compare(candidate) == 0) counter.add(cut.bin(candidate));
    });
    counter.flush();
    sum_bin_groups<kThreads>(bins);
    last = block_find_bin([&](int i) { return ptx::ld_shared(bins + i); }, wanted);
    wanted -= last.before;
    cut.extend(last.bin);
  } while (last.inside != wanted);

  Candidate* list = params.template at<Candidate>(params.list, row * params.wanted);
  walk_candidates<kThreads>(buffer, count, [&](Candidate candidate) {
    const bool takes = !candidate.is_none() && cut.compare(candidate) <= 0;
    const unsigned int lanes = __ballot_sync(0xffffffff, takes);
    if (lanes == 0) return;
    unsigned long long place = 0;
    if (lane == 0) place = atomicAdd(next, static_cast<unsigned long long>(__popc(lanes)));
    place = __shfl_sync(0xffffffff, place, 0) + __popc(lanes & ((1u << lane) - 1));
    if (takes) ptx::st_global(list + place, candidate);
  });
}
