// Distributes the elements of a row by the histogram of their first bits (topk/radix.cuh): the second and last read of
// x.
//
//   bins ahead of that of the last wanted element   to the row's list; the bin itself as well, if all of it is wanted
//   that bin                                        to the row's buffer, in any order
//
// Block b has slice b % splits of row b / splits. A warp counts what its lanes have in a tile, makes room for it with
// one atomic and writes it there. Shared memory: three counts.
#pragma once

#include <topk/radix.cuh>

template <class Op, int kThreads, int kVec, int kFragments>
__global__ void __launch_bounds__(kThreads, 1)
    topk_filter(const __grid_constant__ RadixParams<typename Op::Params> params) {
  using Candidate = typename Op::Candidate;
  using Order = RadixOrder<Op>;
  using Count = typename Order::Count;
  static_assert(kVec * kFragments <= 32, "one bit per element of a tile");
  const int lane = threadIdx.x % 32;
  const unsigned splits = static_cast<unsigned>(params.splits);
  const long long row = blockIdx.x / splits;
  const Op op(params.topk, params.first_row + row);

  // Bins before `listed_end` are for the list, bin `buffered_bin` is for the buffer.
  const Count* histogram = params.template at<Count>(0, row * (kBins + kBinGroups));
  const Count wanted = static_cast<Count>(params.wanted);
  const RadixBin<Count> last = block_find_bin([&](int i) { return ptx::ld_global(histogram + i); }, wanted);
  const bool whole = last.before + last.inside == wanted;
  const unsigned int listed_end = last.bin + whole, buffered_bin = whole ? kBins : last.bin;

  unsigned long long* counters = params.template at<unsigned long long>(params.counters, 2 * row);
  Candidate* list = params.template at<Candidate>(params.list, row * params.wanted);
  Candidate* buffer = params.template at<Candidate>(params.buffer, row * params.topk.row.cols);
  walk_slice<true, kThreads, kVec, kFragments>(
      op, blockIdx.x % splits * params.slice, params.slice,
      [&](const auto& items, long long first_col, int from, int to) {
        unsigned int listed = 0, buffered = 0;  // one bit per element
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const int at = j * kThreads * kVec + e;
            const unsigned int bin = Order::first_bin(op.candidate(items[j], e, first_col + at));
            const bool inside = at >= from && at < to;
            listed |= static_cast<unsigned int>(inside && bin < listed_end) << (j * kVec + e);
            buffered |= static_cast<unsigned int>(inside && bin == buffered_bin) << (j * kVec + e);
          }
        }
        if (!__any_sync(0xffffffff, listed | buffered)) return;

        // Both counts in one word: at most 1024 each in a warp.
        const unsigned int mine = __popc(listed) | __popc(buffered) << 16;
        const unsigned int upto = sum_up_to_lane(mine);
        const unsigned int all = __shfl_sync(0xffffffff, upto, 31);
        const unsigned int needed = lane == 0 ? all & 0xffff : all >> 16;
        unsigned long long place = 0;
        if (lane < 2 && needed > 0) place = atomicAdd(counters + lane, static_cast<unsigned long long>(needed));
        Candidate* to_list = list + __shfl_sync(0xffffffff, place, 0) + (upto - mine & 0xffff);
        Candidate* to_buffer = buffer + __shfl_sync(0xffffffff, place, 1) + (upto - mine >> 16);
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            const Candidate candidate = op.candidate(items[j], e, first_col + j * kThreads * kVec + e);
            if (listed >> (j * kVec + e) & 1) ptx::st_global(to_list++, candidate);
            if (buffered >> (j * kVec + e) & 1) ptx::st_global(to_buffer++, candidate);
          }
        }
      });
}
