// Reductions over groups of lanes. All 32 lanes of the warp must be active; every lane of a group gets the result.
#pragma once

#include <primitives/numeric.cuh>

// Groups of kGroup lanes that lie kStride lanes apart; kGroup = 32 / kStride at most, both powers of two.
template <int kGroup, int kStride = 1, class T>
__device__ __forceinline__ T group_max(T value) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) {
    value = max_number(value, __shfl_xor_sync(0xffffffff, value, offset * kStride));
  }
  return value;
}

template <int kGroup, int kStride = 1, class T>
__device__ __forceinline__ T group_sum(T value) {
#pragma unroll
  for (int offset = kGroup / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffff, value, offset * kStride);
  }
  return value;
}

// How many lanes of the group have `condition`.
template <int kGroup, int kStride = 1>
__device__ __forceinline__ int group_count(bool condition) {
  unsigned int lanes = __ballot_sync(0xffffffff, condition);
  if constexpr (kGroup < 32) {
    unsigned int group = 0;  // that of lane 0
#pragma unroll
    for (int i = 0; i < kGroup; ++i) group |= 1u << i * kStride;
    const int lane = threadIdx.x % 32;
    lanes &= group << (lane / (kGroup * kStride) * (kGroup * kStride) + lane % kStride);
  }
  return __popc(lanes);
}

// Minimum over kGroup neighbouring lanes, of integers too.
template <int kGroup, class T>
__device__ __forceinline__ T group_min(T value) {
#pragma unroll
  for (int mask = 1; mask < kGroup; mask *= 2) value = min(value, __shfl_xor_sync(0xffffffff, value, mask));
  return value;
}

// The sum over this lane and those below. The whole warp calls it.
template <class T>
__device__ __forceinline__ T sum_up_to_lane(T value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T below = __shfl_up_sync(0xffffffff, value, offset);
    if (static_cast<int>(threadIdx.x % 32) >= offset) value += below;
  }
  return value;
}
