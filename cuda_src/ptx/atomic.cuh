// Order between the blocks of one launch, by counters in global memory (sm_70 and newer).
#pragma once

namespace ptx {

// Arrival of the block at `counter`: is it the last one of `count`? All threads call it; or, with barrier `id`, the
// first `threads` of the block, whole warps. What they wrote to global memory before is released, and the last arrival
// acquires what all released; ld_global_cg reads it. A counter is 0 before the first arrival and after the last, at
// which atom.inc wraps around: no launch has to clear it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-atom
__device__ __forceinline__ bool arrive_is_last(unsigned int* counter, unsigned int count, int id = 0, int threads = 0) {
  // Every thread's writes come before what thread 0 does.
  if (threads == 0) {
    __syncthreads();
  } else {
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
  }
  int last = 0;
  if (threadIdx.x == 0) {
    unsigned int before;
    // Before the counter moves, the whole GPU sees the block's writes. The atom's own release promises the same, but
    // TensorRT-LLM found a fence necessary on sm_121.
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    // Its acquire: the last block sees the writes of those that arrived before it.
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(__cvta_generic_to_global(counter)), "r"(count - 1)
                 : "memory");
    last = before == count - 1;
  }
  // What every thread reads next comes after what thread 0 acquired.
  if (threads == 0) return __syncthreads_or(last) != 0;
  asm volatile(
      "{\n .reg .pred last;\n"
      " setp.ne.s32 last, %0, 0;\n"
      " barrier.cta.red.or.aligned.pred last, %1, %2, last;\n"
      " selp.s32 %0, 1, 0, last;\n}"
      : "+r"(last)
      : "r"(id), "r"(threads)
      : "memory");
  return last != 0;
}

// ld.global.cg, 4, 8 or 16 bytes: what another block of the launch wrote. From L2, as L1 and the read-only path may
// hold what was there before.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#cache-operators
template <class T>
__device__ __forceinline__ T ld_global_cg(const T* ptr) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load moves 4, 8 or 16 bytes");
  const auto address = __cvta_generic_to_global(ptr);
  if constexpr (sizeof(T) == 4) {
    unsigned int bits;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(bits) : "l"(address) : "memory");
    return reinterpret_cast<T&>(bits);
  } else if constexpr (sizeof(T) == 8) {
    uint2 bits;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(address) : "memory");
    return reinterpret_cast<T&>(bits);
  } else {
    uint4 bits;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(address)
                 : "memory");
    return reinterpret_cast<T&>(bits);
  }
}

}  // namespace ptx
