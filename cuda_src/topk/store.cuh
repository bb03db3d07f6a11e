// Stores the results of rows whose list is sorted (topk/radix.cuh).
//
// Block b has kItems * kThreads neighbouring results of row b / ceil(k / (kItems * kThreads)). Shared memory: with
// renormalize, for which every block reads the whole list, one state per warp.
#pragma once

#include <topk/radix.cuh>

template <class Op, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1)
    topk_store(const __grid_constant__ RadixParams<typename Op::Params> params) {
  using Candidate = typename Op::Candidate;
  constexpr int kTile = kItems * kThreads;
  const unsigned tiles = static_cast<unsigned>((params.topk.k + kTile - 1) / kTile);
  const long long row = blockIdx.x / tiles;
  const long long begin = static_cast<long long>(blockIdx.x % tiles) * kTile;
  const Op op(params.topk, params.first_row + row);
  const Candidate* list = params.template at<Candidate>(params.source, row * params.wanted);
  const auto sorted = [&](long long e) { return e < params.wanted ? ptx::ld_global(list + e) : Candidate::none(); };
  store_sorted<kThreads>(op, params, params.first_row + row, sorted, begin, min(begin + kTile, params.topk.k));
}
