// What the kernels of attention_topk share: their parameters, what orders keys, and how a row is stored.
#pragma once

#include <attention/params.cuh>
#include <primitives/softmax_state.cuh>
#include <primitives/warp_list.cuh>

constexpr int kMostInPass = 64;  // keys of a query that one pass over K selects

enum AttentionTopKOutput { kTopKProb, kTopKLogProb, kTopKLogit, kTopKState };

// The `first` to first + count best keys of each row, in pass first / kMostInPass over K. A row is a query of a head of
// a sequence; rows are numbered in this order, (batch, heads, q_rows).
struct AttentionTopKParams {
  AttentionParams attention;  // out: values, T, or Acc of a state, [batch, heads, q_rows, num]; lse: m of a state
  void* indices;              // long long [batch, heads, q_rows, num]
  void* l;                    // Acc [batch, heads, q_rows], of a state; else null
  void* bounds;               // Candidate [2, rows]: the last of even and of odd passes; null: there is one pass
  void* states;               // SoftmaxState<Acc> [rows, parts]: of parts of the keys, where blocks share a row
  void* lists;                // Candidate [rows, splits, count]: of these blocks
  long long index_offset;     // added to every index
  int first, count;
  int part, parts;  // keys of a part, and how many there are; sums over parts are added up in one order
  int splits;       // blocks that share a row, each with neighbouring parts
  int output;       // AttentionTopKOutput
  long long indices_stride[4], l_stride[3];

  // Sums over the parts of a row are kept in kSums, part p in number p % kSums, and merged at the end.
  static constexpr int kSums = 4;

  // Where the last candidate of each row in a pass stands.
  template <class Candidate>
  __device__ __forceinline__ Candidate* bounds_of(int pass) const {
    const long long rows = static_cast<long long>(attention.batch) * attention.heads * attention.q_rows;
    return static_cast<Candidate*>(bounds) + pass % 2 * rows;
  }
};

template <class Acc>
struct ScoreCandidate {
  using Type = NarrowCandidate;
};
template <>
struct ScoreCandidate<double> {
  using Type = WideCandidate;
};

// The elements of a pass, from the sorted list of a row, and its state. A whole warp calls it.
template <class T, class Acc, class Candidate, int kPerLane>
__device__ __forceinline__ void store_best(const AttentionTopKParams& params, long long row,
                                           const Candidate (&best)[kPerLane], SoftmaxState<Acc> total) {
  const AttentionParams& p = params.attention;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const long long query = row % p.q_rows, head = row / p.q_rows % p.heads, batch = row / p.q_rows / p.heads;
  const long long out = batch * p.out_stride[0] + head * p.out_stride[1] + query * p.out_stride[2];
  long long* indices = static_cast<long long*>(params.indices) + batch * params.indices_stride[0] +
                       head * params.indices_stride[1] + query * params.indices_stride[2];
  const Acc infinity = Limits<Acc>::infinity(), log_sum = log_natural(total.l);
#pragma unroll
  for (int r = 0; r < kPerLane; ++r) {
    const int e = r * 32 + lane;
    if (e >= params.count) continue;
    const Candidate candidate = best[r];
    const bool none = candidate.is_none();
    const Acc score = none ? -infinity : sorted_value<Acc>(candidate.key(), Acc(1));
    Acc value = score;
    if (params.output == kTopKProb) {
      value = total.m == infinity ? Limits<Acc>::nan() : from_root(exp_root(score - total.m, Acc(1))) / total.l;
      if (none) value = 0;
    } else if (params.output == kTopKLogProb) {
      value = none ? -infinity : score - total.m - log_sum;
    }
    const long long place = params.first + e, offset = out + place * p.out_stride[3];
    ptx::st_global(indices + place * params.indices_stride[3], none ? -1LL : candidate.index() + params.index_offset);
    if (sizeof(T) < sizeof(Acc) && params.output == kTopKState) {
      ptx::st_global(static_cast<Acc*>(p.out) + offset, value);
    } else {
      ptx::st_global(static_cast<T*>(p.out) + offset, from_acc<T>(value));
    }
    if (params.bounds != nullptr && e == params.count - 1) {
      ptx::st_global(params.bounds_of<Candidate>(params.first / kMostInPass) + row, candidate);
    }
  }
  if (params.output == kTopKState && params.first == 0 && lane == 0) {
    const Acc m = total.l == total.l ? total.m : total.l;  // a NaN shows in both
    ptx::st_global(
        static_cast<Acc*>(p.lse) + batch * p.lse_stride[0] + head * p.lse_stride[1] + query * p.lse_stride[2], m);
    ptx::st_global(static_cast<Acc*>(params.l) + batch * params.l_stride[0] + head * params.l_stride[1] +
                       query * params.l_stride[2],
                   total.l);
  }
}
