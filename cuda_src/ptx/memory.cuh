// Loads and stores of 1, 2, 4, 8 or 16 bytes, one instruction each; T is any trivially copyable type of that size.
// Every access to global or shared memory goes through here, which is what lets the emulator check and count them.
#pragma once

namespace ptx {

template <int kBytes>
struct Bits;
template <>
struct Bits<1> {
  using Type = unsigned char;
};
template <>
struct Bits<2> {
  using Type = unsigned short;
};
template <>
struct Bits<4> {
  using Type = unsigned int;
};
template <>
struct Bits<8> {
  using Type = uint2;
};
template <>
struct Bits<16> {
  using Type = uint4;
};

template <class T>
using BitsOf = typename Bits<sizeof(T)>::Type;

// ld.global.nc: bytes that nothing has written since the kernel began.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld-global-nc
template <class T>
__device__ __forceinline__ T ld_global(const T* ptr) {
  BitsOf<T> bits = __ldg(reinterpret_cast<const BitsOf<T>*>(ptr));
  return reinterpret_cast<T&>(bits);
}

// ld.global.cs: the last read of these bytes; the line is the first to be evicted.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#cache-operators
template <class T>
__device__ __forceinline__ T ld_global_streaming(const T* ptr) {
  BitsOf<T> bits = __ldcs(reinterpret_cast<const BitsOf<T>*>(ptr));
  return reinterpret_cast<T&>(bits);
}

// st.global: a result that the next kernel reads back.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st
template <class T>
__device__ __forceinline__ void st_global(T* ptr, T value) {
  *reinterpret_cast<BitsOf<T>*>(ptr) = reinterpret_cast<BitsOf<T>&>(value);
}

// st.global.cs: a result that nothing reads back soon; it does not push inputs out of L2.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#cache-operators
template <class T>
__device__ __forceinline__ void st_global_streaming(T* ptr, T value) {
  __stcs(reinterpret_cast<BitsOf<T>*>(ptr), reinterpret_cast<BitsOf<T>&>(value));
}

// ld.shared, own block.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
template <class T>
__device__ __forceinline__ T ld_shared(const T* smem_ptr) {
  BitsOf<T> bits = *reinterpret_cast<const BitsOf<T>*>(smem_ptr);
  return reinterpret_cast<T&>(bits);
}

// st.shared, own block.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st
template <class T>
__device__ __forceinline__ void st_shared(T* smem_ptr, T value) {
  *reinterpret_cast<BitsOf<T>*>(smem_ptr) = reinterpret_cast<BitsOf<T>&>(value);
}

// ld.relaxed.cta.shared, 4 or 8 bytes: may race with other relaxed accesses to the same object; orders nothing.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-ld
template <class T>
__device__ __forceinline__ T ld_shared_relaxed(const T* smem_ptr) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a relaxed access moves 4 or 8 bytes");
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  if constexpr (sizeof(T) == 4) {
    unsigned int bits;
    asm volatile("ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
    return reinterpret_cast<T&>(bits);
  } else {
    unsigned long long bits;
    asm volatile("ld.relaxed.cta.shared.u64 %0, [%1];" : "=l"(bits) : "r"(address) : "memory");
    return reinterpret_cast<T&>(bits);
  }
}

// st.relaxed.cta.shared, 4 or 8 bytes: may race with other relaxed accesses to the same object; orders nothing.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-st
template <class T>
__device__ __forceinline__ void st_shared_relaxed(T* smem_ptr, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a relaxed access moves 4 or 8 bytes");
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  if constexpr (sizeof(T) == 4) {
    const unsigned int bits = reinterpret_cast<unsigned int&>(value);
    asm volatile("st.relaxed.cta.shared.u32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
  } else {
    const unsigned long long bits = reinterpret_cast<unsigned long long&>(value);
    asm volatile("st.relaxed.cta.shared.u64 [%0], %1;" ::"r"(address), "l"(bits) : "memory");
  }
}

}  // namespace ptx
