// The last element of each row that the filters of `sample` keep (topk/sample.cuh), by s, then index; all that come
// before it are kept. Rows that are finished, or have no probabilities, it leaves alone.
//
//   top_k   the top_k-th element
//   top_p   of the elements up to it, the first where the sum of probabilities reaches top_p of them all
//   min_p   the last place of s = m + log(min_p), if that comes earlier
//
// The first two by radix (topk/radix.cuh), 11 bits of the rank at a time, each with a read of the row: of counts, or of
// probabilities as whole numbers. One block per row. Shared memory: a histogram (kBins + kBinGroups counts) and three
// counts.
#pragma once

#include <topk/radix.cuh>

// Of the elements up to `end`: the first where the sum of weigh(t) reaches wanted(sum over all of them).
template <int kThreads, int kVec, int kFragments, class Op, class Weigh, class Wanted>
__device__ __forceinline__ typename Op::Candidate find_last(const Op& op, typename Op::Candidate end,
                                                            const Weigh& weigh, const Wanted& wanted) {
  using Candidate = typename Op::Candidate;
  using Count = unsigned long long;
  const long long cols = op.params.row.cols;
  Count* bins = ptx::static_smem<Count, kBins + kBinGroups>();
  RadixCut<Op> cut(0, cols);
  Count left = 0;  // of what is wanted, in the bin
  for (bool first = true, found = false; !found; first = false) {
    clear_bins<kThreads>(bins);
    BinCounter<Count> counter{bins};
    // What is outside the row comes after all of it, and weighs nothing that could be wanted.
    walk_slice<false, kThreads, kVec, kFragments>(
        op, 0, cols + kVec, [&](const auto& items, long long first_col, int, int) {
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
#pragma unroll
            for (int e = 0; e < kVec; ++e) {
              const Candidate candidate = op.candidate(items[j], e, first_col + j * kThreads * kVec + e);
              if (end.beats(candidate) || (!first && cut.compare(candidate) != 0)) continue;
              counter.add(first ? RadixOrder<Op>::first_bin(candidate) : cut.bin(candidate), weigh(items[j].t[e]));
            }
          }
        });
    counter.flush();
    sum_bin_groups<kThreads>(bins);
    const int group = kBins + 2 * (threadIdx.x % 32);
    if (first) left = wanted(group_sum<32>(ptx::ld_shared(bins + group) + ptx::ld_shared(bins + group + 1)));
    const RadixBin<Count> last = block_find_bin([&](int i) { return ptx::ld_shared(bins + i); }, left);
    left -= last.before;
    if (first) {
      cut = RadixCut<Op>(last.bin, cols);
    } else {
      cut.extend(last.bin);
    }
    found = last.inside == left || cut.is_one();
  }
  return cut.last();
}

template <class Op, int kThreads, int kVec, int kFragments>
__global__ void __launch_bounds__(kThreads, 1) topk_cut(const __grid_constant__ typename Op::Params params) {
  using Candidate = typename Op::Candidate;
  using Acc = decltype(Op::State::m);
  using Count = unsigned long long;
  const long long row = blockIdx.x;
  const Op op(params, row);
  WideCandidate* result = static_cast<WideCandidate*>(params.cut) + row;
  if (params.finished) {
    const WideCandidate before = ptx::ld_global(static_cast<const WideCandidate*>(params.finished) + row);
    if (before.key() == finished_row().key()) {
      if (threadIdx.x == 0) ptx::st_global(result, before);
      return;
    }
  }
  const long long stat = params.row.row_offset(kStat, row);
  const Acc m = ptx::ld_global(static_cast<const Acc*>(params.row.stat) + stat) / op.unit;

  Candidate last = Candidate::none();
  if (m - m == 0) {
    const auto count = [](Acc) { return Count(1); };
    if (params.top_k < params.row.cols) {
      last = find_last<kThreads, kVec, kFragments>(op, last, count, [&](Count) { return Count(params.top_k); });
    }
    if (params.top_p <= 1) {
      const auto mass = [&](Acc t) { return op.mass(t, m); };
      last = find_last<kThreads, kVec, kFragments>(op, last, mass, [&](Count sum) { return op.wanted(sum); });
    }
  }
  if (threadIdx.x > 0) return;
  WideCandidate cut = last.is_none() ? WideCandidate::none() : WideCandidate::make(last.key(), last.index());
  const double least = op.least(m);
  if (least > -Limits<double>::infinity()) {
    // The least t that reaches it, and its last place.
    const Acc t = static_cast<Acc>(least);
    const WideCandidate end = WideCandidate::make(sort_key(t, Acc(1)) + (t < least), ~0ULL >> 1);
    cut.replace(end.beats(cut), end);
  }
  ptx::st_global(result, cut);
}
