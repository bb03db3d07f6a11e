// Attention over all keys from its results over parts of them: out = sum_i w_i out_i, w_i = exp(lse_i - lse), with
// lse = log sum_i exp(lse_i). A part that saw no key (lse_i = -inf) has no weight, whatever its out holds.
//
// Each thread computes kVec columns of a row, and the weights of that row by itself.
#pragma once

#include <primitives/vector.cuh>

struct AttentionMergeParams {
  const void* outs;  // T [parts, batch, heads, rows, columns]
  const void* lses;  // Acc [parts, batch, heads, rows]
  void* out;
  void* lse;
  long long parts, batch, heads, rows, columns;
  long long outs_stride[5];  // part, batch, head, row, column
  long long lses_stride[4];
  long long out_stride[4];
  long long lse_stride[3];
};

template <class T, class Acc, int kVec, int kThreads>
__global__ void __launch_bounds__(kThreads, 1) attention_merge(const __grid_constant__ AttentionMergeParams params) {
  const long long fragments = params.columns > 0 ? (params.columns + kVec - 1) / kVec : 1;  // 1: lse alone
  const long long index = static_cast<long long>(blockIdx.x) * kThreads + threadIdx.x;
  const long long first = index % fragments * kVec, row = index / fragments % params.rows;
  const long long head = index / fragments / params.rows % params.heads;
  const long long batch = index / fragments / params.rows / params.heads;
  if (batch >= params.batch) return;
  const T* outs = static_cast<const T*>(params.outs) + batch * params.outs_stride[1] + head * params.outs_stride[2] +
                  row * params.outs_stride[3] + first * params.outs_stride[4];
  const Acc* lses = static_cast<const Acc*>(params.lses) + batch * params.lses_stride[1] +
                    head * params.lses_stride[2] + row * params.lses_stride[3];

  Acc m = -Limits<Acc>::infinity();
  for (long long i = 0; i < params.parts; ++i) m = max_number(m, ptx::ld_global(lses + i * params.lses_stride[0]));
  const Acc shift = m == -Limits<Acc>::infinity() ? Acc(0) : m;
  Acc total = 0, sum[kVec] = {};
  for (long long i = 0; i < params.parts; ++i) {
    const Acc weight = exp_natural(ptx::ld_global(lses + i * params.lses_stride[0]) - shift);
    total += weight;
    if (weight == 0) continue;  // its out may be NaN
    using Vector = Fragment<T, kVec>;
    const T* part = outs + i * params.outs_stride[0];
    Vector values;
    if (kVec > 1) {
      values = ptx::ld_global(reinterpret_cast<const Vector*>(part));
    } else {
      values.element[0] = first < params.columns ? ptx::ld_global(part) : T();
    }
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[e] += mul_rn(weight, to_acc<Acc>(values.element[e]));  // a + b = b + a
  }
  if (first == 0) {
    ptx::st_global(static_cast<Acc*>(params.lse) + batch * params.lse_stride[0] + head * params.lse_stride[1] +
                       row * params.lse_stride[2],
                   shift + log_natural(total));
  }
  T* out = static_cast<T*>(params.out) + batch * params.out_stride[0] + head * params.out_stride[1] +
           row * params.out_stride[2] + first * params.out_stride[3];
#pragma unroll
  for (int e = 0; e < kVec; ++e) {
    const T value = from_acc<T>(total == 0 ? Acc(0) : sum[e] / total);
    if (first + e < params.columns) ptx::st_global(out + e * params.out_stride[3], value);
  }
}
