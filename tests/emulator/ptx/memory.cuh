// Twin of cuda_src/ptx/memory.cuh: every access is bounds-checked, race-checked and counted by the runtime.
#pragma once

namespace emu {

template <class T>
constexpr void check_access_size() {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16,
                "one instruction moves 1, 2, 4, 8 or 16 bytes");
}

template <class T>
constexpr void check_relaxed_size() {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a relaxed access moves 4 or 8 bytes");
}

}  // namespace emu

namespace ptx {

template <class T>
__forceinline__ T ld_global(const T* ptr, EMU_SITE) {
  ::emu::check_access_size<T>();
  alignas(16) unsigned char bits[sizeof(T)];
  ::emu::global_load(ptr, bits, sizeof(T), site);
  return reinterpret_cast<T&>(bits);
}

template <class T>
__forceinline__ T ld_global_streaming(const T* ptr, EMU_SITE) {
  return ld_global(ptr, site);
}

template <class T>
__forceinline__ void st_global(T* ptr, T value, EMU_SITE) {
  ::emu::check_access_size<T>();
  ::emu::global_store(ptr, &value, sizeof(T), site);
}

template <class T>
__forceinline__ void st_global_streaming(T* ptr, T value, EMU_SITE) {
  st_global(ptr, value, site);
}

template <class T>
__forceinline__ T ld_shared(const T* smem_ptr, EMU_SITE) {
  ::emu::check_access_size<T>();
  alignas(16) unsigned char bits[sizeof(T)];
  ::emu::shared_load(smem_ptr, bits, sizeof(T), site);
  return reinterpret_cast<T&>(bits);
}

template <class T>
__forceinline__ void st_shared(T* smem_ptr, T value, EMU_SITE) {
  ::emu::check_access_size<T>();
  ::emu::shared_store(smem_ptr, &value, sizeof(T), site);
}

template <class T>
__forceinline__ T ld_shared_relaxed(const T* smem_ptr, EMU_SITE) {
  ::emu::check_relaxed_size<T>();
  alignas(16) unsigned char bits[sizeof(T)];
  ::emu::shared_load_relaxed(smem_ptr, bits, sizeof(T), site);
  return reinterpret_cast<T&>(bits);
}

template <class T>
__forceinline__ void st_shared_relaxed(T* smem_ptr, T value, EMU_SITE) {
  ::emu::check_relaxed_size<T>();
  ::emu::shared_store_relaxed(smem_ptr, &value, sizeof(T), site);
}

}  // namespace ptx
