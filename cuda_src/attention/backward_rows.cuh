// Statistics of each query, which the other kernels of attention_backward read: lse, and D = rowsum(dO o O) - dlse.
//
// Eight lanes have a row, 16 bytes at a time (kVector) or by element.
#pragma once

#include <attention/backward.cuh>

template <class Op, bool kVector>
__global__ void __launch_bounds__(128) attention_backward_rows(const __grid_constant__ AttentionBackwardParams params) {
  using T = typename Op::Element;
  using Acc = typename Op::Acc;
  constexpr int kLanes = 8, kRows = 16;
  const AttentionParams& a = params.attention;
  const int units = a.cu_seqlens_q != nullptr ? a.heads : a.batch * a.heads;
  QueryBlock block;
  if (!find_block(a, kRows, units, blockIdx.x, block)) return;
  const long long batch = a.cu_seqlens_q != nullptr ? 0 : block.batch, head = block.head;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, row = block.first + static_cast<int>(threadIdx.x) / kLanes;
  const Acc infinity = Limits<Acc>::infinity();

  Acc lse = -infinity, sum = 0;
  if (row < block.q_len) {
    lse = ptx::ld_global(static_cast<const Acc*>(a.lse) + batch * a.lse_stride[0] + head * a.lse_stride[1] +
                         (block.q_start + row) * a.lse_stride[2]);
  }
  const bool sees = lse != -infinity;
  if (sees) {
    constexpr int kVec = kVector ? 16 / sizeof(T) : 1;
    using Chunk = Fragment<T, kVec>;
    const T* out = row_of<const T>(a.out, a.out_stride, batch, head, block.q_start + row);
    const T* grad = row_of<const T>(params.grad, params.grad_stride, batch, head, block.q_start + row);
    for (int column = lane * kVec; column < a.value_dim; column += kLanes * kVec) {
      const Chunk x = ptx::ld_global(reinterpret_cast<const Chunk*>(grad + column * params.grad_stride[3]));
      const Chunk y = ptx::ld_global(reinterpret_cast<const Chunk*>(out + column * a.out_stride[3]));
#pragma unroll
      for (int e = 0; e < kVec; ++e) {
        Acc own = to_acc<Acc>(x.element[e]);
        if constexpr (kIsSame<Op, Tf32Op>) own = __uint_as_float(ptx::cvt_rna_tf32(own));  // as dP is made of it
        sum = ::fma(own, to_acc<Acc>(y.element[e]), sum);
      }
    }
  }
  sum = group_sum<kLanes>(sum);
  if (lane != 0 || row >= (block.rows + 1) / 2 * 2) return;
  if (sees && params.grad_lse != nullptr) {
    sum -= ptx::ld_global(static_cast<const Acc*>(params.grad_lse) + batch * params.grad_lse_stride[0] +
                          head * params.grad_lse_stride[1] + (block.q_start + row) * params.grad_lse_stride[2]);
  }
  RowStats<Acc>* stats = static_cast<RowStats<Acc>*>(params.stats);
  ptx::st_global(stats + stats_row(params, batch, head, block.batch, block.q_start, row),
                 RowStats<Acc>{sees ? lse : infinity, sum});
}
