// Twin of cuda_src/ptx/atomic.cuh: who has released and acquired what is kept by the runtime.
#pragma once

namespace ptx {

__forceinline__ bool arrive_is_last(unsigned int* counter, unsigned int count, int id = 0, int threads = 0, EMU_SITE) {
  return ::emu::arrive_is_last(counter, count, id, threads, site);
}

template <class T>
__forceinline__ T ld_global_cg(const T* ptr, EMU_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load moves 4, 8 or 16 bytes");
  alignas(16) unsigned char bits[sizeof(T)];
  ::emu::global_load_coherent(ptr, bits, sizeof(T), site);
  return reinterpret_cast<T&>(bits);
}

}  // namespace ptx
