// Twin of cuda_src/ptx/smem.cuh: both hand out pieces of the running block's arena.
#pragma once

namespace emu {

// Its address is unique to the arguments of one static_smem.
template <class T, int kCount, int kTag>
inline char static_smem_key;

}  // namespace emu

namespace ptx {

template <class T, int kCount, int kTag = 0>
__forceinline__ T* static_smem() {
  return static_cast<T*>(::emu::static_smem(&::emu::static_smem_key<T, kCount, kTag>, sizeof(T) * kCount));
}

template <class T, int kAlignment = 128>
__forceinline__ T* dynamic_smem() {
  static_assert(kAlignment > 0 && kAlignment <= 1024 && (kAlignment & (kAlignment - 1)) == 0,
                "a power of two up to 1024");
  static_assert(kAlignment % alignof(T) == 0, "aligned for T");
  return static_cast<T*>(::emu::dynamic_smem(kAlignment));
}

}  // namespace ptx
