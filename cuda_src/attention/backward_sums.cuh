// dsinks and dslopes: sums over the queries of a head, in one order.
//
//   dsink = -sum exp(sink - lse) D    (a sink is a key with dP = 0)
//   dslope = sum of the shares that attention/backward_q.cuh leaves for each query
//
// A block has one result: those of sinks first.
#pragma once

#include <attention/backward.cuh>

template <class Acc, int kWarps>
__global__ void __launch_bounds__(32 * kWarps)
    attention_backward_sums(const __grid_constant__ AttentionBackwardSumsParams params) {
  const AttentionBackwardParams& p = params.backward;
  const AttentionParams& a = p.attention;
  const int sinks = params.dsinks != nullptr ? a.heads : 0, index = static_cast<int>(blockIdx.x);
  const bool of_sink = index < sinks, all = of_sink || params.slope_batches == 1;
  const int head = of_sink ? index : (index - sinks) % a.heads, own_batch = of_sink ? 0 : (index - sinks) / a.heads;
  const Acc sink = of_sink ? ptx::ld_global(static_cast<const Acc*>(a.sinks) + head) : Acc(0);

  Acc sum = 0;
  QueryBlock block;
  for (block.batch = all ? 0 : own_batch; block.batch < (all ? a.batch : own_batch + 1); ++block.batch) {
    block.q_start = 0;
    block.rows = a.q_rows;
    block.k_rows = 0;  // whatever it is
    if (a.cu_seqlens_q != nullptr) {
      const Sequence queries = sequence_of(a.cu_seqlens_q, a.q_rows, block.batch);
      block.q_start = queries.start;
      block.rows = queries.rows;
    }
    find_bounds(a, block);
    const long long batch = a.cu_seqlens_q != nullptr ? 0 : block.batch;
    const long long first = stats_row(p, batch, head, block.batch, block.q_start, 0);
    for (int row = static_cast<int>(threadIdx.x); row < block.q_len; row += 32 * kWarps) {
      if (of_sink) {
        const RowStats<Acc> own = ptx::ld_global(static_cast<const RowStats<Acc>*>(p.stats) + first + row);
        sum -= probability<true>(sink, ScoreBase<Acc>::kUnit, own.lse) * own.delta;
      } else {
        sum += ptx::ld_global(static_cast<const Acc*>(p.stats) + 2 * stats_rows(p) + first + row);
      }
    }
  }
  sum = group_sum<32>(sum);
  Acc* sums = ptx::static_smem<Acc, kWarps>();
  if (threadIdx.x % 32 == 0) ptx::st_shared(sums + threadIdx.x / 32, sum);
  __syncthreads();  // the sums of all warps
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) sum += ptx::ld_shared(sums + warp);
  Acc* out = static_cast<Acc*>(of_sink ? params.dsinks : params.dslopes);
  ptx::st_global(out + (of_sink ? index : index - sinks), sum);
}
