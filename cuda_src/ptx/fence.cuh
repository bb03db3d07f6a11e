// The async proxy, through which bulk copies and wgmma access shared memory (sm_90 and newer).
#pragma once

namespace ptx {

// Orders the thread's ordinary accesses to shared memory before what the async proxy does to the same bytes, once a
// barrier has told the thread that starts it.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-membar-fence
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace ptx
