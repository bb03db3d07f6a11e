// One lane of a warp, for what one thread does for all (sm_90 and newer).
#pragma once

namespace ptx {

// Whether this lane is the elected one, always the same lane of a warp; the whole warp calls it. Unlike a comparison of
// the lane's number this tells the compiler that one thread is active: instructions that take uniform operands need no
// loop.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-elect-sync
__device__ __forceinline__ bool elect_one() {
  int elected;
  asm volatile(
      "{\n .reg .pred elected;\n"
      " elect.sync _|elected, 0xffffffff;\n"
      " selp.s32 %0, 1, 0, elected;\n}"
      : "=r"(elected));
  return elected != 0;
}

}  // namespace ptx
