// Shared memory by function, because `__shared__` and `extern __shared__` have no meaning on a host.
#pragma once

namespace ptx {

// kCount elements of the block's static shared memory. Calls with equal arguments share one array; kTag tells two
// apart.
template <class T, int kCount, int kTag = 0>
__device__ __forceinline__ T* static_smem() {
  __shared__ alignas(16) unsigned char bytes[sizeof(T) * kCount];
  return reinterpret_cast<T*>(bytes);
}

// Start of the block's dynamic shared memory. One kAlignment per program, as there is a single object.
template <class T, int kAlignment = 128>
__device__ __forceinline__ T* dynamic_smem() {
  extern __shared__ __align__(kAlignment) unsigned char dynamic_smem_bytes[];
  return reinterpret_cast<T*>(dynamic_smem_bytes);
}

}  // namespace ptx
